"""Small architectures for open_clip to know by name, and what tests of exports share."""

from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models.eva import Eva

from gradeclip_ft.export.card import Origin

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@register_model
def eva02_test_patch8_clip_32(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The layout of EVA02-CLIP B and L."""
    settings = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    settings |= {"use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "mlp_ratio": 2.0}
    return _eva(settings, kwargs)


@register_model
def eva01_test_patch8_clip_32(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The layout of EVA01-CLIP g."""
    return _eva({"mlp_ratio": 2.0}, kwargs)


def _eva(settings: dict[str, Any], chosen: dict[str, Any]) -> Eva:
    allowed = ("num_classes", "global_pool")
    return Eva(**TRUNK, **settings, **{key: chosen[key] for key in allowed if key in chosen})


def timm_tower(name: str) -> dict[str, Any]:
    return {"image_size": 32, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny-test-export": {"vision_cfg": VISION},
    "tiny-test-nested": {"vision_cfg": VISION, "quick_gelu": True, "custom_text": True},
    "tiny-test-scaled": {"vision_cfg": {**VISION, "ls_init_value": 0.5}},
    "tiny-test-eva02": {"vision_cfg": timm_tower("eva02_test_patch8_clip_32"), "custom_text": True},
    "tiny-test-eva01": {"vision_cfg": timm_tower("eva01_test_patch8_clip_32"), "custom_text": True},
}
ORIGIN = Origin(start="random")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
