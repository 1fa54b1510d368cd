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
        layer: Number of layers before the bottleneck; None for three quarters of them, which is the
            published 9 of 12.
        beta: Weight of the information against the match.
        steps: Of Adam.
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
        if not blocks:
            raise UnsupportedTowerError(
                "M2IB puts its bottleneck between two layers, but this tower is an attention pool "
                f"alone; choose {ONE_LAYER}"
            )
        layer = 3 * blocks // 4 if self.layer is None else self.layer
        if not 0 <= layer < blocks:
            raise ValueError(
                f"layer is {layer} of {blocks}; choose 0 to {blocks - 1}, or null for "
                f"{3 * blocks // 4}"
            )
        with torch.no_grad():
            before = opened.run(opened.tokens, 0, layer).float()
        rows = [
            self._one(opened.rows(owner[row, None]), before[owner[row, None]], target[row], layer)
            for row in range(len(owner))
        ]
        return torch.stack(rows) if rows else target.new_zeros(0, before.shape[1])

    def _one(self, opened: Pass, x: Tensor, target: Tensor, layer: int) -> Float[Tensor, " N"]:
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        alpha = torch.full_like(x, START, requires_grad=True)
        optimizer = torch.optim.Adam([alpha], lr=self.lr)
        copies = torch.zeros(self.samples, dtype=torch.long, device=x.device)
        repeated = opened.rows(copies)
        for _ in range(self.steps):
            loss, _ = self._loss(repeated, x, alpha, target, generator, layer)
            (alpha.grad,) = torch.autograd.grad(loss, alpha)
            optimizer.step()
        relevance = information(x, alpha.detach())[0].sum(-1)
        if not relevance.isfinite().all():
            raise ValueError(
                f"M2IB diverged with lr {self.lr} and beta {self.beta}; use less of lr"
            )
        return relevance

    def _loss(
        self,
        opened: Pass,
        x: Tensor,
        alpha: Tensor,
        target: Tensor,
        generator: torch.Generator,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """β · mean KL - mean match, and the match."""
        passed = alpha.sigmoid()
        noise = torch.randn(
            (self.samples, *x.shape[1:]), generator=generator, device=x.device, dtype=x.dtype
        )
        tokens = x * passed + (1 - passed) * noise
        embedding = opened.embed(tokens, layer)
        match = opened.score(embedding, target.expand(self.samples, -1)).mean()
        return self.beta * information(x, alpha).mean() - match, match


def information(x: Tensor, alpha: Tensor) -> Tensor:
    """KL of N(x m, (1-m)²) against N(0, 1), element by element, m = σ(α)."""
    passed = alpha.sigmoid()
    variance = ((1 - passed) ** 2).clamp(min=torch.finfo(x.dtype).tiny)  # σ(α) may round to 1
    return -0.5 * (1 + variance.log() - (x * passed) ** 2 - variance)
