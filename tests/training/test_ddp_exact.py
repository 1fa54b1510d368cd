"""Two processes under DDP against one process on the joined batch, through the whole trainer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.training.optim import freeze
from tests.ranks import run_two
from tests.tiny import FAMILIES, images, make_tiny_clip
from tests.training import two_ranks
from tests.training.two_ranks import CASES, Case

TOLERANCE = 1e-5  # of a tensor's own scale: fp32 sums in another order


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, all cases in one go; a hang ends it."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two("tests.training.two_ranks", folder)
    return folder


@pytest.mark.ddp
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one_on_the_joined_batch(gathered: Path, case: Case) -> None:
    """C1-C5, C7: loss and gradient of every parameter, whatever each process has to do."""
    got = torch.load(gathered / f"{case.name}.0", weights_only=True)
    other = torch.load(gathered / f"{case.name}.1", weights_only=True)
    assert got.pop("collectives") == other.pop("collectives") != []
    assert all(torch.equal(value, other[name]) for name, value in got.items())
    expected = two_ranks.alone(case)
    assert got.keys() == expected.keys()
    largest = max(value.abs().max().item() for name, value in expected.items() if name != "loss")
    for name, value in expected.items():
        # Gradients that are zero in exact arithmetic (of key biases) are noise of the others' size
        scale = max(value.abs().max().item(), 1e-2 * largest) if name != "loss" else value.item()
        error = (got[name] - value).abs().max().item() / abs(scale)
        assert error < TOLERANCE, f"{name}: {error}"


def test_the_cases_would_notice_a_wrong_average() -> None:
    """Would catch references so alike that any of them would do."""
    rank, everyone = (two_ranks.alone(Case((3, 7), loss)) for loss in ("rank", "all"))
    assert abs(rank["loss"] - everyone["loss"]) > 1e-2 * everyone["loss"]
    name = "visual.proj"
    assert (rank[name] - everyone[name]).abs().max() > 1e-2 * everyone[name].abs().max()


@pytest.mark.parametrize("loss", ["local", "global"])
@pytest.mark.parametrize("phrases", [5, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_is_in_the_graph(family: str, phrases: int, loss: str) -> None:
    """C4, C5: DDP without find_unused_parameters hangs or dies where one is not."""
    clip = make_tiny_clip(family)
    if loss == "local" and clip.image.unexplained is not None:
        pytest.skip("no heat maps, so no local loss")
    freeze(clip.model)
    batch = two_ranks.part(two_ranks.joined((phrases, 0)), (phrases, 0), 0)
    batch = replace(batch, images=images(clip, two_ranks.IMAGES))
    objective = GlobalLocal(GradEclip()) if loss == "local" else GlobalOnly()
    objective(clip, batch).total.backward()
    learning = [(name, p) for name, p in clip.model.named_parameters() if p.requires_grad]
    assert [name for name, parameter in learning if parameter.grad is None] == []
