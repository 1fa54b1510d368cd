"""Where maps point, through the whole pipeline, with methods whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.maps import LocalisationEvaluator, phrases_of
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.itsm import Itsm
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.evaluators.conftest import NAMES, Load, Unable, World, modes

PROMPT = "a photo of the {}"


@dataclass(frozen=True)
class Knowing:
    """A method whose map is the share of the target's colour in every patch."""

    sign: int = 1
    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        assert torch.is_grad_enabled()  # evaluators run without gradients, methods need them
        dense = tower.dense(x)[owner]  # (P, h, w, K)
        heat: Tensor = self.sign * torch.einsum("phwk,pk->phw", dense, target)
        return heat


@dataclass(frozen=True)
class Flat(Knowing):
    """A method that says nothing."""

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        return torch.full((len(owner), 4, 4), 0.3)


def evaluator(world: World, explainers: Any, **options: Any) -> LocalisationEvaluator:
    data = CocoRegions(
        **world.panoptic, min_area=0, mask_antialias=False, limit=options.pop("limit", None)
    )
    settings = {"prompt": PROMPT, "batch_size": 4, **options}
    return LocalisationEvaluator("pointing", data, explainers, **settings)


def test_a_method_that_knows_points_and_its_negative_does_not(world: World, load: Load) -> None:
    """Pictures are wide, high and square; any slip of the geometry costs hits."""
    methods = {"knows": Knowing(), "reversed": Knowing(-1), "flat": Flat()}
    measured = evaluator(world, methods)(load(224, 16))
    found = measured.metrics
    assert found["knows/pointing"] > 0.999
    assert found["knows/any_object"] > 0.999
    assert found["knows/energy"] > 0.85  # cells at the edges reach over them
    assert found["reversed/pointing"] < 0.01
    assert found["flat/pointing"] == found["flat/energy"] == 0.0
    shares = []
    for name, each in world.rectangles.items():
        width, height = Image.open(world.folder / "images" / name).size
        for label in {label for label, *_ in each}:
            own = [w * h for other, _, _, w, h in each if other == label]
            shares.append(sum(own) / (width * height))
    # Of the picture, since padding does not count. Resized masks swell by a pixel.
    assert found["chance/pointing"] == pytest.approx(sum(shares) / len(shares), abs=0.01)
    assert found["chance/any_object"] == 1.0  # the rectangles fill their pictures
    phrases = sum(len({label for label, *_ in each}) for each in world.rectangles.values())
    assert measured.details["phrases"] == phrases
    assert measured.details["constant_maps"] == {"flat": phrases}
    assert measured.protocol["image_size"] == 224
    assert measured.data["counts"]["images"] == 18  # type: ignore[index,call-overload]


def test_what_a_step_would_pool_is_told_before_training(world: World, load: Load) -> None:
    """A knowing map pools its object, a flat one the picture, a reversed one nothing at all.

    The flat map of a picture of n classes names one of them.
    """
    methods = {"knows": Knowing(), "reversed": Knowing(-1), "flat": Flat()}
    found = evaluator(world, methods)(load(224, 16)).metrics
    assert found["knows/inside"] > 0.85
    assert found["reversed/inside"] == 0.0
    assert found["flat/inside"] == pytest.approx(found["chance/inside"])
    assert found["knows/pooled"] == found["true_mask/pooled"] == 1.0
    assert found["flat/pooled"] == found["chance/pooled"]
    assert 0.2 < found["chance/pooled"] < 0.4


def test_a_map_for_another_class_misses(world: World, load: Load) -> None:
    """Would catch text vectors or masks that are given to the wrong phrase."""
    wrong = load(224, 16, table=torch.eye(len(NAMES)).roll(1, dims=0))
    found = evaluator(world, {"knows": Knowing()})(wrong).metrics
    assert found["knows/pointing"] < 0.3


def test_numbers_do_not_depend_on_the_batch(world: World, load: Load) -> None:
    methods = {"knows": Knowing(), "reversed": Knowing(-1)}
    one = evaluator(world, methods, batch_size=1)(load(224, 16))
    many = evaluator(world, methods, batch_size=18)(load(224, 16))
    assert one.metrics == pytest.approx(many.metrics, abs=1e-5)
    assert one.data == many.data
    assert one.protocol == many.protocol


def test_what_a_tower_cannot_do_is_left_out_and_said(
    world: World, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(224, 16)
    before = modes(loaded.clip)
    measured = evaluator(world, {"unable": Unable(), "knows": Knowing()}, limit=5)(loaded)
    assert not any(key.startswith("unable") for key in measured.metrics)
    assert measured.details["left_out"] == {"unable": "this tower has no such layer"}
    assert caplog.text.count("unable is left out") == 1
    assert modes(loaded.clip) == before
    with pytest.raises(UnsupportedTowerError, match="no such layer"):
        evaluator(world, {"unable": Unable()}, limit=5)(loaded)


def test_one_image_pass_serves_all_methods(world: World) -> None:
    """Catches a pass for each method, or for the phrases of a second method."""
    loaded, passes = load_clip("shapes_tiny"), []
    loaded.clip.model.visual.conv1.register_forward_hook(lambda *call: passes.append(call[2]))
    methods = {"grad_eclip": GradEclip(), "raw": RawAttention(), "game": Game(), "itsm": Itsm()}
    measured = evaluator(world, methods, limit=5)(loaded)
    assert [len(batch) for batch in passes] == [4, 1]
    assert {key.split("/")[0] for key in measured.metrics} == {"chance", "true_mask", *methods}


def test_methods_are_chosen_by_name_and_their_settings_recorded(world: World, load: Load) -> None:
    both = {"knows": Knowing(), "reversed": Knowing(-1)}
    chosen = evaluator(world, both, methods=["reversed"], limit=3)
    assert chosen.protocol["methods"] == {"reversed": {"method": "Knowing", "sign": -1}}
    told = {key.split("/")[0] for key in chosen(load(224, 16)).metrics}
    assert told == {"chance", "true_mask", "reversed"}
    with pytest.raises(ValueError, match="nobody; choose from knows, reversed"):
        evaluator(world, both, methods=["nobody"])(load(224, 16))


def test_half_precision_is_refused(world: World, load: Load) -> None:
    loaded = load(224, 16)
    loaded.clip.to(torch.bfloat16)
    with pytest.raises(ValueError, match="set precision=float32"):
        evaluator(world, {"knows": Knowing()})(loaded)


def test_objects_of_a_class_are_joined_and_empty_ones_counted() -> None:
    masks = torch.zeros(4, 2, 2)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2, 0, 1] = 1
    batch = RegionBatch(
        images=torch.zeros(2, 3, 2, 2),
        boxes=torch.zeros(4, 4),
        masks=masks,
        labels=torch.tensor([7, 7, 3, 3]),
        is_thing=torch.ones(4),
        owner=torch.tensor([0, 0, 0, 1]),
    )
    found = phrases_of(batch)
    assert found.empty == 1
    assert list(zip(found.owner.tolist(), found.labels.tolist(), strict=True)) == [(0, 3), (0, 7)]
    assert found.masks.int().tolist() == [[[0, 1], [0, 0]], [[1, 0], [0, 1]]]
    assert found.objects.int().tolist() == [[[1, 1], [0, 1]]] * 2
