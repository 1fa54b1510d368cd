"""Fixtures that every folder of tests shares."""

from pathlib import Path

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.clip import Clip
from tests.tiny import CLASS_TOKEN, FAMILIES, TEXTS, make_tiny_clip, make_tiny_text

REPOSITORY = Path(__file__).resolve().parents[1]


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


@pytest.fixture(params=CLASS_TOKEN)
def tiny_clip(request: pytest.FixtureRequest) -> Clip:
    """The class-token families of the papers, in evaluation mode."""
    return make_tiny_clip(request.param)


@pytest.fixture(params=FAMILIES)
def any_clip(request: pytest.FixtureRequest) -> Clip:
    """Every family of image towers."""
    return make_tiny_clip(request.param)


@pytest.fixture(params=list(TEXTS))
def text_clip(request: pytest.FixtureRequest) -> Clip:
    """Every family of text towers, beside a plain ViT."""
    return make_tiny_text(request.param)


@pytest.fixture
def tiny_vit() -> Clip:
    """The plain ViT family alone."""
    return make_tiny_clip("vit")


@pytest.fixture
def tiny_batch() -> CaptionBatch:
    """Three images, five phrases of four kinds; the second image has none."""
    return make_tiny_batch()


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
