"""Which adapter fits a tower. What none fits still encodes."""

from __future__ import annotations

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block

from gradeclip_ft.models.tower import Tower, opaque_tower
from gradeclip_ft.models.towers.resnet import resnet_tower
from gradeclip_ft.models.towers.text import context_length, hf_text_tower, transformer_text_tower
from gradeclip_ft.models.towers.timm import trunk_tower
from gradeclip_ft.models.towers.vit import vit_tower
from gradeclip_ft.models.trace import Foreign, UnsupportedTowerError

BLOCKS = (ResidualAttentionBlock, EvaBlock, EvaBlockPostNorm, Block)
"""Transformer blocks that passes run by the library's own code."""


def image_tower(visual: Foreign) -> Tower:
    """The adapter of an image encoder; one that only encodes where none is exact."""
    try:
        if isinstance(visual, VisionTransformer):
            return vit_tower(visual)
        if isinstance(visual, ModifiedResNet):
            return resnet_tower(visual)
        if isinstance(visual, TimmModel):
            return trunk_tower(visual)
        raise UnsupportedTowerError(f"image tower is {type(visual).__name__}")
    except UnsupportedTowerError as error:
        return opaque_tower(visual, str(error))


def text_tower(model: Foreign) -> Tower:
    """The adapter of a model's text encoder; one that only encodes where none is exact."""
    text = model.text if hasattr(model, "text") else model
    nested = isinstance(text, HFTextEncoder)
    try:
        return hf_text_tower(text) if nested else transformer_text_tower(text)
    except UnsupportedTowerError as error:
        return opaque_tower(
            model.text if hasattr(model, "text") else model.encode_text,
            str(error),
            context_length=context_length(text) if nested else int(text.context_length),
            pad=int(text.config.pad_token_id if nested else getattr(text, "pad_id", 0) or 0),
            cuts_exactly=nested,
        )
