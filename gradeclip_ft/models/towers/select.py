"""Which adapter fits a tower. What none fits still encodes."""

from __future__ import annotations

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from gradeclip_ft.models.tower import (
    ImageTower,
    OpaqueImageTower,
    OpaqueTextTower,
    TextTower,
    library_text,
)
from gradeclip_ft.models.towers.resnet import ResNetTower
from gradeclip_ft.models.towers.text import (
    HuggingFaceTextTower,
    TransformerTextTower,
    context_length,
)
from gradeclip_ft.models.towers.timm import EvaTower, LatentPoolTower, TimmVitTower
from gradeclip_ft.models.towers.vit import CocaTower, VitTower
from gradeclip_ft.models.trace import Foreign, UnsupportedTowerError

BLOCKS = (ResidualAttentionBlock, EvaBlock, EvaBlockPostNorm, Block)
"""Transformer blocks that passes run by the library's own code."""


def image_tower(visual: Foreign) -> ImageTower:
    """The adapter of an image encoder; one that only encodes where none is exact."""
    try:
        return _image_tower(visual)
    except UnsupportedTowerError as error:
        return OpaqueImageTower(visual, str(error))


def text_tower(model: Foreign) -> TextTower:
    """The adapter of a model's text encoder; one that only encodes where none is exact."""
    text = model.text if hasattr(model, "text") else model
    try:
        if isinstance(text, HFTextEncoder):
            return HuggingFaceTextTower(text)
        return TransformerTextTower(text)
    except UnsupportedTowerError as error:
        nested = isinstance(text, HFTextEncoder)
        return OpaqueTextTower(
            library_text(model),
            str(error),
            context_length=context_length(text) if nested else int(text.context_length),
            pad=int(text.config.pad_token_id if nested else getattr(text, "pad_id", 0) or 0),
            cuts_exactly=nested,
        )


def _image_tower(visual: Foreign) -> ImageTower:
    if isinstance(visual, VisionTransformer):
        return VitTower(visual) if visual.attn_pool is None else CocaTower(visual)
    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual)
    if not isinstance(visual, TimmModel):
        raise UnsupportedTowerError(f"image tower is {type(visual).__name__}")
    return trunk_tower(visual)


def trunk_tower(visual: Foreign) -> ImageTower:
    """The adapter of a timm trunk with a head behind it."""
    trunk = visual.trunk
    if isinstance(getattr(trunk, "attn_pool", None), AttentionPoolLatent):
        return LatentPoolTower(visual)
    if isinstance(trunk, Eva):
        return EvaTower(visual)
    if isinstance(trunk, TimmVisionTransformer):
        return TimmVitTower(visual)
    raise UnsupportedTowerError(f"image tower is timm's {type(trunk).__name__}")
