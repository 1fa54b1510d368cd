"""The evaluators of conf/ build, and read the same shapes world as the training data."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.build import build_evaluators
from gradeclip_ft.commands.config import check, compose, options

SHAPES = ("shapes_regions", "shapes_retrieval")
MAPS = ("shapes_pointing", "coco_pointing", "timing")


@pytest.mark.parametrize("name", options("evaluator"))
def test_every_evaluator_builds_under_its_own_name(name: str) -> None:
    cfg = compose("evaluate", [f"evaluator={name}"])
    check(cfg, "evaluate")
    ((key, evaluator),) = build_evaluators(cfg).items()
    assert key == evaluator.name == name
    assert evaluator.protocol["task"]


def test_several_evaluators_can_be_chosen() -> None:
    cfg = compose("evaluate", ["evaluator=[coco_regions_224,coco_retrieval]"])
    assert list(build_evaluators(cfg)) == ["coco_regions_224", "coco_retrieval"]


def test_the_papers_protocol_is_the_default_for_coco() -> None:
    """Table 7: 63 templates, 224 px, boxes of at least 64 px, at most 100 segments, crowds kept."""
    (evaluator,) = build_evaluators(compose("evaluate", ["evaluator=coco_regions_224"])).values()
    chosen = ("image_size", "templates", "min_area", "max_regions", "crowd", "source")
    found = {key: evaluator.protocol[key] for key in chosen}
    assert found == {
        "image_size": 224,
        "templates": "vild",
        "min_area": 64,
        "max_regions": 100,
        "crowd": True,
        "source": "panoptic",
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["name=x"],
        ["name=x", "+exp=smoke"],
        ["name=x", "data.make.folder=elsewhere"],
        ["name=x", "data=shapes2"],
    ],
    ids=["default", "smoke", "other folder", "world 2"],
)
def test_training_and_evaluation_read_one_shapes_world(overrides: list[str]) -> None:
    """Other numbers would have the world rebuilt between the two, or evaluate another one."""
    cfg = OmegaConf.to_container(compose("train", overrides), resolve=True)
    assert isinstance(cfg, dict)
    assert cfg["data"]["shards"] == f"{cfg['data']['make']['folder']}/train"
    for name in SHAPES:
        data = cfg["evaluator"][name]["data"]
        assert data["make"] == cfg["data"]["make"]
        assert Path(cfg["data"]["shards"]).is_relative_to(data["make"]["folder"])
        assert Path(data["annotations"]).is_relative_to(cfg["data"]["make"]["folder"])


@pytest.mark.parametrize("world", [1, 2])
def test_the_protocol_tells_world_2_from_1(world: int) -> None:
    """Results of the first world keep the protocol that they have."""
    names = "[shapes_regions,shapes_retrieval,shapes_choose_regions,shapes_choose_retrieval]"
    data = "shapes" if world == 1 else "shapes2"
    cfg = compose("train", ["name=x", f"data={data}", f"evaluator={names}"])
    for evaluator in build_evaluators(cfg).values():
        assert evaluator.protocol.get("world") == (None if world == 1 else 2)


def test_evaluate_takes_the_world_of_the_data() -> None:
    """A model of world 2 measured on scenes of world 1 would be a wrong number without a word."""
    cfg = compose(
        "evaluate", ["data=shapes2", "evaluator=[shapes_regions,shapes_choose_retrieval]"]
    )
    check(cfg, "evaluate")
    for evaluator in build_evaluators(cfg).values():
        assert evaluator.protocol["world"] == 2
        assert str(evaluator.data.annotations).startswith("data/shapes2/")


def test_the_smoke_experiment_takes_other_data() -> None:
    """Half a `make`, merged into data that are not made, would be no function."""
    cfg = compose("train", ["+exp=smoke", "data=coco_captions", "name=x"])
    assert check(cfg, "train") is None
    assert cfg.data.make._target_ == "gradeclip_ft.data.shapes.make_shapes"
    assert cfg.data.shards == "data/coco/shards"


def test_evaluate_alone_makes_the_world_of_the_training_data() -> None:
    alone = OmegaConf.to_container(
        compose("evaluate", ["evaluator=[shapes_regions,shapes_retrieval,shapes_pointing]"]),
        resolve=True,
    )
    train = OmegaConf.to_container(compose("train", ["name=x"]), resolve=True)
    assert isinstance(alone, dict)
    assert isinstance(train, dict)
    for name in (*SHAPES, "shapes_pointing"):
        assert alone["evaluator"][name]["data"]["make"] == train["data"]["make"]


@pytest.mark.parametrize("name", MAPS)
def test_an_evaluation_of_maps_compares_every_method_for_pictures(name: str) -> None:
    """Would catch a new method that stands in no table."""
    (evaluator,) = build_evaluators(compose("evaluate", [f"evaluator={name}"])).values()
    assert set(evaluator.protocol["methods"]) == set(options("explainer")) - set(
        COMMANDS["explain"].never
    )
