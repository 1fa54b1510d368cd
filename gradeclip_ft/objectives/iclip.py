"""ICLIP (Li et al., 2022, "Exploring Visual Interpretability for Contrastive Language-Image ...").

A text tower learns to meet a frozen, self-supervised image tower in two ways: by the class token,
and by the patches that this token attends to, each way with projections of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.losses import contrastive_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import UnsupportedTowerError, record_layers
from gradeclip_ft.objectives.base import Composed
from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.heatmap import min_max


@dataclass(eq=False, kw_only=True)
class ICLIP(Composed):
    """L = ½ [ CLIP(x_cls, y) + CLIP(F_c φ'_i, y φ'_t) ], F_c = max over patches of f(x)_i · A_i.

    A is the attention of the class token to the patches, its mean over heads from 0 to 1. The
    projections of recognition, φ_i and φ_t, are the model's own; φ'_i and φ'_t are weights of this
    objective and start as the identity. The
    explainer `iclip` reads them from the run's checkpoint.

    Attributes:
        map_image: φ'_i, from the tower's patch features; empty until `begin`.
        map_text: φ'_t, from the text's embedding.
    """

    def __post_init__(self) -> None:
        """The projections are as wide as embeddings, which `begin` knows."""
        super().__post_init__()
        self.map_image, self.map_text = nn.ParameterList(), nn.ParameterList()

    def check(self, clip: Clip) -> None:
        """The image tower needs a class token that attends to patches.

        Raises:
            UnsupportedTowerError: It has none.
        """
        super().check(clip)
        tower = clip.image
        if tower.unexplained is not None or tower.pooling != "class token":
            raise UnsupportedTowerError(
                f"ICLIP masks patches by the attention of a class token, but this tower pools by "
                f"{tower.pooling}; choose a model such as ViT-B-16"
            )

    def begin(self, clip: Clip) -> None:
        """Copies, and the projections.

        Raises:
            ValueError: The image tower learns.
        """
        super().begin(clip)
        if any(part.requires_grad for part in clip.model.visual.parameters()):
            raise ValueError("ICLIP's image tower is frozen; set optim.train_image=false")
        text = torch.zeros(1, clip.text.context_length, dtype=torch.long, device=clip.device)
        with torch.no_grad():
            width = clip.text.encode(text).shape[1]
        for place in (self.map_image, self.map_text):
            place.append(nn.Parameter(torch.eye(width, device=clip.device)))

    def own_loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Recognition and explanation, each half."""
        recognition = self.global_loss(step)
        patches, captions = masked_patches(step), step.captions
        scale = step.clip.log_scale.exp()
        with step.single_precision():
            pooled = patches.amax(1) @ self.map_image[0]
            explanation = contrastive_loss(pooled, captions.float() @ self.map_text[0], scale)
        parts = {"global": recognition.detach(), "explanation": explanation.detach()}
        return 0.5 * (self.global_weight * recognition + explanation), parts


@torch.no_grad()
def masked_patches(step: Step) -> Float[Tensor, "B n D"]:
    """Features of the patches after the last layer, times the class token's attention to them."""
    images, trace = step.batch.images, step.trace
    # The trace has run the layers before; opening again embeds patches alone.
    opened = replace(step.clip.image.open(images), tokens=trace.tokens, layers=(trace.layer,))
    owner = torch.arange(len(images), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        record = record_layers(opened, owner, depth=1, heads="all")
        attention = record.of_query(record.layers[-1].attention.mean(1))  # (B, N)
        mask = min_max(attention, record.explained)
        rows = opened.head(record.tokens) * mask.unsqueeze(2)
    height, width = opened.grid or (0, 0)
    return rows[:, rows.shape[1] - height * width :]
