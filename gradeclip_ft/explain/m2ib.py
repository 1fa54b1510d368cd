"""M2IB (Wang et al., 2023): by an information bottleneck, how much of each token a match needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.models.tower import Tower
from gradeclip_ft.models.trace import ONE_LAYER, Pass, UnsupportedTowerError

START = 5.0  # σ(5): nearly everything passes


@dataclass(frozen=True)
class M2ib:
    """Noise on a layer's tokens, as much as the match allows; H = Σ_c KL of what remains.

    Attributes:
        layer: Layer whose output is narrowed, counted from 0; None for the one at three quarters of
            them, the published 9 of 12.
        beta: Weight of the information against the match.
        steps: Of Adam. As published, the map is that before the last of them.
        lr: Of Adam.
        samples: Noisy copies per step.
        seed: Of the noise.
    """

    layer: int | None = None
    beta: float = 0.1
    steps: int = 10
    lr: float = 1.0
    samples: int = 10
    seed: int = 0

    images_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise ValueError(f"steps is {self.steps} and samples {self.samples}; use 1 or more")

    def from_input(
        self,
        tower: Tower,
        x: Shaped[Tensor, "B ..."],
        target: Float[Tensor, "P D"],
        owner: Int[Tensor, " P"],
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target; images and texts.

        Raises:
            UnsupportedTowerError: The tower has no layers before its pool.
            ValueError: The tower has fewer layers.
        """
        opened = tower.open(x)
        blocks = len(opened.layers) - opened.is_pooled
        # What is narrowed must meet attention again: that of a later block, or of the pool.
        last = blocks - 1 if opened.is_pooled else blocks - 2
        if last < 0:
            raise UnsupportedTowerError(
                "M2IB puts its bottleneck between two layers, but this tower has one alone; choose "
                f"{ONE_LAYER}"
            )
        usual = min(3 * blocks // 4, last)
        layer = usual if self.layer is None else self.layer
        if not 0 <= layer <= last:
            raise ValueError(f"layer is {layer} of {blocks}; use 0 to {last}, or null for {usual}")
        with torch.no_grad():
            after = opened.run(opened.tokens, 0, layer + 1).float()
        found = [after.new_zeros(0, after.shape[1])]
        for row, image in enumerate(owner.unsqueeze(1)):
            found.append(self._narrow(opened.rows(image), after[image], target[row], layer + 1))
        return torch.cat(found)

    def _narrow(self, opened: Pass, x: Tensor, target: Tensor, start: int) -> Float[Tensor, "1 N"]:
        """Σ over channels of the information in x, the input of layer `start`, that is needed."""
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        alpha = torch.full_like(x, START, requires_grad=True)
        optimizer = torch.optim.Adam([alpha], lr=self.lr)
        repeated = opened.rows(torch.zeros(self.samples, dtype=torch.long, device=x.device))
        targets = target.expand(self.samples, -1)
        for _ in range(self.steps - 1):
            passed = alpha.sigmoid()
            noise = torch.randn(
                (self.samples, *x.shape[1:]), generator=generator, device=x.device, dtype=x.dtype
            )
            embedding = repeated.embed(x * passed + (1 - passed) * noise, start)
            match = repeated.score(embedding, targets).mean()
            loss = self.beta * information(x, alpha).mean() - match
            (alpha.grad,) = torch.autograd.grad(loss, alpha)
            optimizer.step()
        relevance = information(x, alpha.detach()).sum(-1)
        if not relevance.isfinite().all():
            raise ValueError(
                f"M2IB diverged with lr {self.lr} and beta {self.beta}; use less of lr"
            )
        return relevance


def information(x: Tensor, alpha: Tensor) -> Tensor:
    """KL of N(x m, (1-m)²) against N(0, 1), element by element, m = σ(α)."""
    passed = alpha.sigmoid()
    variance = ((1 - passed) ** 2).clamp(min=torch.finfo(x.dtype).tiny)  # σ(α) may round to 1
    return -0.5 * (1 + variance.log() - (x * passed) ** 2 - variance)
