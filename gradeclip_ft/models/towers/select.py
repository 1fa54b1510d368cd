"""Which adapter fits a tower. What none fits still encodes."""

from __future__ import annotations

from types import SimpleNamespace

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVisionTransformer

from gradeclip_ft.models.tower import Foreign, ImageTower, TextTower, UnsupportedTowerError
from gradeclip_ft.models.towers import hf_text
from gradeclip_ft.models.towers.coca import CocaTower
from gradeclip_ft.models.towers.eva import EvaTower
from gradeclip_ft.models.towers.hf_text import HuggingFaceTextTower
from gradeclip_ft.models.towers.latent_pool import LatentPoolTower
from gradeclip_ft.models.towers.logits import LogitTower
from gradeclip_ft.models.towers.opaque import OpaqueImageTower, OpaqueTextTower, library_text
from gradeclip_ft.models.towers.resnet import ResNetTower
from gradeclip_ft.models.towers.text import TransformerTextTower
from gradeclip_ft.models.towers.timm_vit import TimmVitTower
from gradeclip_ft.models.towers.torchvision_vit import TorchvisionVitTower
from gradeclip_ft.models.towers.vit import VitTower

BLOCKS = (ResidualAttentionBlock, EvaBlock, EvaBlockPostNorm, Block)
"""Transformer blocks that passes run by the library's own code."""


def image_tower(visual: Foreign) -> ImageTower:
    """The adapter of an image encoder; one that only encodes where none is exact."""
    try:
        return _image_tower(visual)
    except UnsupportedTowerError as error:
        return OpaqueImageTower(visual, str(error))


def classifier_tower(model: Foreign) -> ImageTower:
    """The adapter of a classifier of timm or torchvision.

    Raises:
        UnsupportedTowerError: None is exact.
    """
    if isinstance(model, TorchvisionVisionTransformer):
        return LogitTower(TorchvisionVitTower(model))
    return LogitTower(_trunk_tower(SimpleNamespace(trunk=model, head=nn.Identity())))


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
            context_length=hf_text.context_length(text) if nested else int(text.context_length),
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
    return _trunk_tower(visual)


def _trunk_tower(visual: Foreign) -> ImageTower:
    """The adapter of a timm trunk with a head behind it."""
    trunk = visual.trunk
    if isinstance(getattr(trunk, "attn_pool", None), AttentionPoolLatent):
        return LatentPoolTower(visual)
    if isinstance(trunk, Eva):
        return EvaTower(visual)
    if isinstance(trunk, TimmVisionTransformer):
        return TimmVitTower(visual)
    raise UnsupportedTowerError(f"image tower is timm's {type(trunk).__name__}")
