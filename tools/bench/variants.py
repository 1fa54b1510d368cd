"""One training step in five ways: what is compared, and nothing about clocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.optim import Optimizer

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.losses import AlignmentOptions, alignment_loss, contrastive_loss
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.ops.heatmap import pool_heatmap
from gradeclip_ft.training.module import MAX_LOG_SCALE
from gradeclip_ft.training.optim import adamw

from .inputs import Pair, full_captions, full_phrases, make_batch, read_pairs
from .published import published_heat

OPEN_CLIP = "open_clip, 77 tokens"
ORDINARY = "ordinary"
GRAD_ECLIP = "Grad-ECLIP"
PUBLISHED = "published maps"
PUBLISHED_77 = "published maps, phrases of 77 tokens"
NAMES = (OPEN_CLIP, ORDINARY, GRAD_ECLIP, PUBLISHED, PUBLISHED_77)
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Steps:
    """Everything a step reads.

    Attributes:
        loaded: The model, shared by all variants.
        batch: As our loader gives it.
        captions: Of 77 tokens.
        phrases: Of 77 tokens, every one.
        optimizer: Shared.
        pairs: Where batches are from.
        source: The same in words.
        precision: None for fp32.
    """

    loaded: LoadedClip
    batch: CaptionBatch
    captions: Tensor
    phrases: Tensor
    optimizer: Optimizer
    pairs: list[Pair]
    source: str
    precision: torch.dtype | None

    def with_batch(self, batch_size: int, phrases: int) -> Steps:
        """The same model and optimiser on another batch."""
        device = self.batch.images.device
        captions = full_captions(self.loaded, self.pairs, batch_size)
        every = full_phrases(self.loaded, self.pairs, batch_size, phrases)
        batch = make_batch(self.loaded, self.pairs, batch_size, phrases)
        return replace(
            self, batch=batch.to(device), captions=captions.to(device), phrases=every.to(device)
        )

    def tokens(self, name: str) -> int:
        """Patches and words that a variant reads."""
        side = self.loaded.patch
        patches = self.batch.images[:, 0].numel() // side**2 + len(self.batch.images)
        if name == OPEN_CLIP:
            return patches + self.captions.numel()
        texts = 0 if name == ORDINARY else self.batch.distinct.numel()
        if name == PUBLISHED_77:
            texts = self.phrases.numel()
        return patches + self.batch.captions.numel() + texts

    def run(self, name: str) -> None:
        """One step of that variant: forward, backward, optimiser."""
        losses: dict[str, Callable[[], Tensor]] = {
            OPEN_CLIP: self._open_clip,
            ORDINARY: lambda: GlobalOnly()(self.loaded.require_clip("trained"), self.batch).total,
            GRAD_ECLIP: lambda: grad_eclip(self.loaded, self.batch),
            PUBLISHED: lambda: published(self.loaded, self.batch, None),
            PUBLISHED_77: lambda: published(self.loaded, self.batch, self.phrases),
        }
        device = self.batch.images.device.type
        low = torch.autocast(device, self.precision) if self.precision else nullcontext()
        self.optimizer.zero_grad()
        with low:
            loss = losses[name]()
        loss.backward()  # type: ignore[no-untyped-call]
        if name != OPEN_CLIP:
            self._guard()
        self.optimizer.step()
        with torch.no_grad():
            self.loaded.clip.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def _open_clip(self) -> Tensor:
        """As open_clip_train does: `model(images, texts)` and `ClipLoss`."""
        model: Any = self.loaded.clip.model
        loss: Tensor = ClipLoss()(*model(self.batch.images, self.captions)[:3])
        return loss

    def _guard(self) -> None:
        """What our trainer does between backward and optimiser: look at the gradients, clip."""
        parameters = [p for p in self.loaded.clip.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(norm.isfinite()):
            raise RuntimeError(f"the gradient norm is {norm}; nothing was measured")
        nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)


def make_steps(
    model: str, *, batch_size: int, phrases: int, device: str, weights: str = "random"
) -> Steps:
    """Model, batch and optimiser of a measurement."""
    torch.manual_seed(0)
    loaded = load_clip(model, weights)
    loaded.clip.to(device).train()
    pairs, source = read_pairs(max(phrases, 5))
    return Steps(
        loaded=loaded,
        batch=make_batch(loaded, pairs, batch_size, phrases).to(device),
        captions=full_captions(loaded, pairs, batch_size).to(device),
        phrases=full_phrases(loaded, pairs, batch_size, phrases).to(device),
        optimizer=adamw(loaded.require_clip("trained").named_parameters()),
        pairs=pairs,
        source=source,
        precision=torch.bfloat16 if device.startswith("cuda") else None,
    )


def grad_eclip(loaded: LoadedClip, batch: CaptionBatch) -> Tensor:
    """Loss of conf/objective/global_local.yaml."""
    objective = GlobalLocal(GradEclip(create_graph=True))
    return objective(loaded.require_clip("trained"), batch).total


def published(loaded: LoadedClip, batch: CaptionBatch, full: Tensor | None) -> Tensor:
    """The same loss with stopped maps computed as published, each part by a pass of its own.

    Args:
        loaded: The model.
        batch: The batch.
        full: Phrases at the full context, each computed however often it comes; None for those of
            the batch, cut and distinct.
    """
    clip = loaded.clip
    opened = clip.image.open(batch.images)
    tokens = opened.run(opened.tokens, 0, len(opened.layers) - 1)
    last = opened.layers[-1]
    assert last.run is not None
    embedding = opened.head(last.run(tokens, opened.mask))[:, 0]  # the native block in full
    captions = clip.text.encode(batch.captions)
    if full is None:
        phrases = clip.text.encode(batch.distinct)[batch.phrase]
    else:
        phrases = clip.text.encode(full)
    _, _, v = last.attend(tokens, lambda rows: rows[:, 0])
    dense = opened.head(last.finish(tokens[:, 1:], v[:, 1:]))
    assert opened.grid is not None
    dense = dense.view(len(tokens), *opened.grid, -1)
    heat = published_heat(opened, tokens, phrases, batch.owner)
    with torch.autocast(tokens.device.type, enabled=False):
        scale = clip.log_scale.exp()
        local = alignment_loss(
            pool_heatmap(dense, heat, batch.owner),
            phrases,
            identity=batch.identity[batch.phrase],
            weight=heat.amax((1, 2)),
            scale=scale.detach(),
            options=AlignmentOptions(),
        )
        return contrastive_loss(embedding, captions, scale) + local.loss
