"""Fixtures that every folder of tests shares."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from torch import nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.clip import Clip

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = ("vit", "vit_layer_scale", "eva02", "eva02_fused")
TEXT = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real photos, captions and the tagger beside the checkout, where they are present."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(params=FAMILIES)
def tiny_clip(request: pytest.FixtureRequest) -> Clip:
    """Two layers of width 32 on a 4 x 4 grid, one per tower family, in evaluation mode."""
    return make_tiny_clip(request.param)


@pytest.fixture
def tiny_vit() -> Clip:
    """The plain ViT family alone."""
    return make_tiny_clip("vit")


@pytest.fixture
def tiny_batch() -> CaptionBatch:
    """Three images, five phrases of four kinds; the second image has none."""
    return make_tiny_batch()


def make_tiny_clip(family: str, seed: int = 0) -> Clip:
    """A small random model; biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
    if family == "vit_layer_scale":
        vision["ls_init_value"] = 0.5
    if family.startswith("eva02"):
        model = open_clip.CustomTextCLIP(16, vision, TEXT)
        model.visual = _tiny_eva(fused=family.endswith("fused"))
    else:
        model = open_clip.CLIP(16, vision, TEXT, quick_gelu=family == "vit_layer_scale")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Clip(model).eval()


def make_tiny_batch(seed: int = 1) -> CaptionBatch:
    """Random pixels and ids; 49 is the end of a text."""
    generator = torch.Generator().manual_seed(seed)

    def texts(rows: int, length: int) -> torch.Tensor:
        ids = torch.randint(1, 48, (rows, length), generator=generator)
        ids[:, -1] = 49
        return ids

    return CaptionBatch(
        images=torch.randn(3, 3, 32, 32, generator=generator),
        captions=texts(3, 16),
        distinct=texts(4, 8),
        identity=torch.tensor([11, 12, 13, 14]),
        phrase=torch.tensor([0, 1, 2, 0, 3]),
        owner=torch.tensor([0, 0, 0, 2, 2]),
        keys=("a", "b", "c"),
    )


def _tiny_eva(*, fused: bool) -> TimmModel:
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.image_size = (32, 32)
    visual.trunk = Eva(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        qkv_fused=fused,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=not fused,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        num_classes=16,
        global_pool="token",
    )
    visual.head = nn.Sequential()
    return visual
