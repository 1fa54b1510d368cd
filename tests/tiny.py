"""Small random models, one per tower family.

Biases and norms are random too, so that a forgotten one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gradeclip_ft.models.clip import Clip

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
TEXT = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
DIM = 16


def wrap(trunk: nn.Module) -> TimmModel:
    """A timm trunk as open_clip holds it, without a projection of its own."""
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.image_size = (32, 32)
    visual.trunk, visual.head = trunk, nn.Sequential()
    return visual


def eva(**changes: Any) -> TimmModel:
    """An EVA trunk; EVA02's unless changed."""
    settings = {
        "mlp_ratio": 2.0,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (16, 16),
        "num_classes": DIM,
        "global_pool": "token",
    }
    return wrap(Eva(**TRUNK, **{**settings, **changes}))


def timm_vit(**changes: Any) -> TimmModel:
    """Timm's VisionTransformer."""
    settings = {"num_classes": DIM, "global_pool": "token"}
    return wrap(VisionTransformer(**TRUNK, **{**settings, **changes}))


def resnet() -> ModifiedResNet:
    """CLIP's ResNet on 64 pixels: a 2 x 2 grid."""
    return ModifiedResNet((1, 1, 1, 1), output_dim=DIM, heads=4, image_size=64, width=4)


IMAGE: dict[str, Callable[[], nn.Module]] = {
    "eva02": eva,
    "eva02_fused": partial(eva, qkv_fused=True, scale_attn_inner=False),
    "eva01": partial(
        eva,
        qkv_fused=True,
        swiglu_mlp=False,
        scale_mlp=False,
        scale_attn_inner=False,
        use_rot_pos_emb=False,
    ),
    "eva_post_norm": partial(eva, qkv_fused=True, use_post_norm=True, scale_attn_inner=False),
    "dinov2": partial(timm_vit, init_values=0.5, reg_tokens=2, no_embed_class=True),
    "timm_vit": partial(timm_vit, qk_norm=True),
    "siglip": partial(timm_vit, class_token=False, global_pool="map", num_classes=0),
    "pe": partial(eva, global_pool="map", use_fc_norm=False, num_classes=0),
    "resnet": resnet,
}
OWN: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_layer_scale": {"ls_init_value": 0.5},
    "vit_bare": {"no_ln_pre": True, "final_ln_after_pool": True},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3},
}
FAMILIES = (*OWN, *IMAGE)
CLASS_TOKEN = ("vit", "vit_layer_scale", "eva02", "eva02_fused")
TEXTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "eos": {"pool_type": "eos", "eos_id": 49},
    "layer_scale": {"ls_init_value": 0.5},
    "siglip": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    "coca": {"embed_cls": True},
    "coca_correct": {"embed_cls": True},
    "bert": {"hf_pooler_type": "cls_pooler"},
    "bert_last": {"hf_pooler_type": "cls_last_hidden_state_pooler"},
    "bert_mean": {"hf_pooler_type": "mean_pooler"},
    "roberta": {"hf_pooler_type": "cls_pooler"},
    "roberta_mean": {"hf_pooler_type": "mean_pooler"},
}


def make_tiny_clip(family: str, seed: int = 0) -> Clip:
    """Two layers of width 32 on a 4 x 4 grid, embeddings of 16, in evaluation mode."""
    torch.manual_seed(seed)
    vision = {**VISION, **OWN.get(family, {})}
    if family in IMAGE:
        model = open_clip.CustomTextCLIP(DIM, VISION, TEXT)
        model.visual = IMAGE[family]()
        width = getattr(getattr(model.visual, "trunk", None), "num_features", DIM)
        if width != DIM and isinstance(model.visual, TimmModel):
            pooled = getattr(model.visual.trunk, "attn_pool", None) is not None
            model.visual.head = nn.Linear(32, DIM) if pooled else model.visual.head
    else:
        model = open_clip.CLIP(DIM, vision, TEXT, quick_gelu=family == "vit_layer_scale")
    return _shaken(model)


def make_tiny_text(family: str, seed: int = 0) -> Clip:
    """A plain ViT with a text tower of this family."""
    torch.manual_seed(seed)
    changes = TEXTS[family]
    model = open_clip.CustomTextCLIP(DIM, VISION, {**TEXT, **changes} if _own(family) else TEXT)
    if family == "coca_correct":
        model.text.correct_cls_mask = True
    if not _own(family):
        model.text = _hugging_face(family, changes["hf_pooler_type"])
    return _shaken(model)


def image_size(clip: Clip) -> int:
    """Side of the images of a tiny clip."""
    return 64 if clip.image.patch == 32 else 32


def images(clip: Clip, rows: int, seed: int = 2) -> torch.Tensor:
    """Random pixels at the clip's own size."""
    side = image_size(clip)
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


@contextmanager
def recorded_attention() -> Iterator[list[torch.Tensor]]:
    """Outputs (B, A, N, c) of every attention that torch itself computes meanwhile."""
    outputs: list[torch.Tensor] = []
    native = torch.nn.functional.scaled_dot_product_attention

    def record(*args: object, **kwargs: object) -> torch.Tensor:
        outputs.append(native(*args, **kwargs))
        return outputs[-1]

    torch.nn.functional.scaled_dot_product_attention = record
    try:
        yield outputs
    finally:
        torch.nn.functional.scaled_dot_product_attention = native


def _own(family: str) -> bool:
    return "hf_pooler_type" not in TEXTS[family]


def _hugging_face(family: str, pooler: str) -> nn.Module:
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig, RobertaConfig

    kind = BertConfig if family.startswith("bert") else RobertaConfig
    config = kind(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0 if family.startswith("bert") else 1,
    )
    return HFTextEncoder("", DIM, config=config, pooler_type=pooler, proj_type="linear")


def _shaken(model: nn.Module) -> Clip:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Clip(model).eval()
