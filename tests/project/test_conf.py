"""Every yaml of conf/ composes, passes the check and builds its object."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.cli import jobs
from gradeclip_ft.commands.config import (
    ConfigurationError,
    check,
    compose,
    groups,
    options,
)
from gradeclip_ft.explain.base import InputExplainer, RecordExplainer
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(
    path.relative_to(CONF).with_suffix("").as_posix() for path in (CONF / "exp").rglob("*.yaml")
)
LEAVES = [
    (group, option)
    for group in groups()
    if group.split("/")[0] not in ("exp", "methods", "classes", "segmenter")
    for option in options(group)
]
# Methods that explain but cannot weigh a training step.
SLOW = [
    option
    for option in options("explainer")
    if "create_graph" not in (CONF / "explainer" / f"{option}.yaml").read_text()
]
LEAVES = [leaf for leaf in LEAVES if leaf not in [("explainer", option) for option in SLOW]]
# Values that a leaf asks the user for.
OPEN = {
    "model=open_clip": ["model.name=ViT-B-32", "model.weights=random"],
    "model=folder": ["model.name=exports/try"],
}


@cache
def composed(group: str, option: str) -> DictConfig:
    """A configuration in which this choice was made."""
    place = {"explainer": "explainer@objective.explainer", "term": "+term@objective.terms.a"}
    chosen = f"{place.get(group, group)}={option}"
    cfg = compose("train", ["name=a", chosen, *OPEN.get(f"{group}={option}", [])])
    check(cfg, "train")
    return cfg


@pytest.mark.parametrize(("group", "option"), LEAVES)
def test_every_choice_composes_and_passes_the_check(group: str, option: str) -> None:
    """Would catch a yaml whose keys drifted from the constructor behind it."""
    composed(group, option)


def test_every_primary_file_composes_and_passes_the_check() -> None:
    """Would catch a command that cannot start, or evaluators that cannot stand side by side."""
    check(compose("export", []), "export")
    check(compose("explain", ["images=a.jpg"]), "explain")
    everything = ",".join(options("evaluator"))
    cfg = compose("evaluate", [f"evaluator=[{everything}]"])
    check(cfg, "evaluate")
    assert sorted(cfg.evaluator) == options("evaluator")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_begins_with_its_command_and_what_to_expect(experiment: str) -> None:
    """Would catch a row of the paper that cannot be started, or does not say how."""
    header, command, expect = (CONF / f"{experiment}.yaml").read_text().splitlines()[:3]
    assert header == "# @package _global_"
    assert expect.startswith("# To expect")
    words = shlex.split(command.removeprefix("# "))
    while "=" in words[0]:  # PHOTOS=FOLDER
        words = words[1:]
    assert words[:4] == ["python", "-m", "gradeclip_ft", "train"]
    group, _, option = experiment.rpartition("/")
    chosen = jobs("train", [word for word in words[4:] if word != "-m"])
    mine = [job for job in chosen if f"+{group}={option}" in job]
    for overrides in ([f"+{group}={option}", "name=a"], mine[0]):
        check(compose("train", overrides), "train")


def test_an_experiment_of_the_paper_has_the_paper_s_numbers() -> None:
    """Would catch a value changed for a trial and committed."""
    for name, model, data in (
        ("cc3m_vitb16", "EVA02-B-16", "cc3m"),
        ("cc3m_vitl14", "EVA02-L-14-336", "cc3m"),
        ("coco_vitb16", "EVA02-B-16", "coco"),
    ):
        cfg = compose("train", [f"+exp={name}", "name=a"])
        assert cfg.model.name == model
        assert data in str(cfg.data.shards)
        assert (cfg.optim.optimizer.lr, cfg.optim.optimizer.weight_decay) == (1e-5, 0.1)
        assert cfg.trainer.devices * cfg.data.batch_size == 128
        assert cfg.optim.schedule.steps == cfg.trainer.max_steps
        assert cfg.objective.explainer.heads == "one"
        assert cfg.objective.alignment.kind == "focal"


def test_the_two_runs_of_the_shapes_world_differ_in_the_objective_alone() -> None:
    """Would catch a comparison of runs with different steps, data or learning rate."""
    first, second = (
        OmegaConf.to_container(compose("train", [f"+exp={name}", "name=a"]), resolve=True)
        for name in ("shapes", "shapes_ordinary")
    )
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert [key for key in first if first[key] != second[key]] == ["objective"]


@pytest.fixture(scope="module")
def loaded() -> LoadedClip:
    """The packaged model."""
    return load_clip("shapes_tiny")


@pytest.mark.parametrize(
    ("group", "option"), [leaf for leaf in LEAVES if leaf[0] in ("explainer", "objective", "term")]
)
def test_every_objective_and_what_it_holds_is_built(group: str, option: str) -> None:
    """Would catch a value that the constructor refuses."""
    assert callable(instantiate(composed(group, option).objective, _convert_="all"))


@pytest.mark.parametrize("option", SLOW)
def test_methods_for_explanation_are_built_and_refused_in_training(option: str) -> None:
    """Would catch a value that the constructor refuses, and a training run that dies at step 1."""
    node = OmegaConf.load(CONF / "explainer" / f"{option}.yaml")
    assert isinstance(instantiate(node, _convert_="all"), RecordExplainer | InputExplainer)
    with pytest.raises(ConfigurationError, match="takes no create_graph"):
        check(compose("train", ["name=a", f"explainer@objective.explainer={option}"]), "train")


@pytest.mark.parametrize("option", options("data"))
def test_every_data_set_is_built(option: str, loaded: LoadedClip) -> None:
    """Would catch keyword names that yaml and build.py both give, or neither."""
    make = instantiate(composed("data", option).data, _convert_="all")
    if option.startswith("boxes"):
        source = make(side=64, mean=loaded.mean, std=loaded.std)
    else:
        source = make(tokenizer=loaded.tokenizer, transform=loaded.transform(train=True))
    assert source.batch_size > 0


HUB_TOKENIZER, LARGE, YOURS = "siglip_b16", "eva02_l14_336", ("folder", "blip")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [name for name in options("model") if name not in (HUB_TOKENIZER, LARGE, *YOURS)]
)
def test_every_model_is_built(option: str) -> None:
    """Would catch a model name that open_clip does not know, or towers without an adapter."""
    random = {} if option in ("shapes_tiny", "shapes2_tiny") else {"weights": "random"}
    model = instantiate(composed("model", option).model, **random)
    assert model.image_model.image.width > 0


@pytest.mark.slow
@pytest.mark.parametrize(("option", "size"), [(LARGE, 336), (HUB_TOKENIZER, 224)])
def test_models_that_are_not_built_have_their_name_and_size(option: str, size: int) -> None:
    """Would catch a wrong name without 428 million parameters, or a tokenizer from the hub."""
    import open_clip

    node = composed("model", option).model
    assert open_clip.get_model_config(node.name)["vision_cfg"]["image_size"] == size
    assert node.weights in open_clip.list_pretrained_tags_by_model(node.name)


def test_every_yaml_says_what_it_is() -> None:
    """Would catch an entry without a word in `list`."""
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        first = next(line for line in lines if not line.startswith("# @"))
        assert re.match(r"# \S", first), path
