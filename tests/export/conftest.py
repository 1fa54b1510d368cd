"""Small registered architectures with random weights, biases and norms included."""

import json

import open_clip
import pytest
import torch

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from tests.export.small import ARCHITECTURES, TEXT


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedClip]:
    """A model of every architecture, by name."""
    folder = tmp_path_factory.mktemp("architectures")
    models = {}
    for seed, (name, changes) in enumerate(ARCHITECTURES.items()):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT, **changes}))
        open_clip.add_model_config(path)
        torch.manual_seed(seed)
        models[name] = load_clip(name, "random")
        with torch.no_grad():
            for parameter in models[name].clip.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return models


@pytest.fixture
def vit(small: dict[str, LoadedClip]) -> LoadedClip:
    """OpenAI's type with the text tower beside it, as open_clip's CLIP has it."""
    return small["tiny-test-export"]


@pytest.fixture
def nested(small: dict[str, LoadedClip]) -> LoadedClip:
    """The same with quick GELU and the text tower below `text.`."""
    return small["tiny-test-nested"]


@pytest.fixture
def eva02(small: dict[str, LoadedClip]) -> LoadedClip:
    """EVA02 with a separate projection for q, k and v."""
    return small["tiny-test-eva02"]


@pytest.fixture(scope="session")
def packaged() -> LoadedClip:
    """The packaged CLIP, which open_clip knows no name for."""
    return load_clip("shapes_tiny")
