"""A configuration that composes may still be nonsense; it is refused before torch is imported."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from gradeclip_ft.commands import plugins
from gradeclip_ft.commands.config import (
    ConfigurationError,
    check,
    compose,
    conf_dir,
    fits,
    run_name,
    targets,
)
from tools import write_targets


def complaint(*overrides: str, command: str = "train") -> str:
    """What the check says about these overrides."""
    with pytest.raises(ConfigurationError) as caught:
        check(compose(command, overrides), command)
    return str(caught.value)


def test_the_list_of_targets_is_current() -> None:
    """Would catch an argument that was renamed, or a target that commands do not know."""
    assert (conf_dir() / "targets.json").read_text() == write_targets.content(), (
        "run python -m tools.write_targets"
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optim.optimizer.lrr=1", "optim.optimizer.lrr: adamw takes no lrr; did you mean lr?"),
        ("+seeed=1", "seeed: there is no such key; did you mean seed?"),
        ("+evaluation.evry=1", "evaluation.evry: there is no such key; did you mean every?"),
        ("+objective.local_wieght=2", "did you mean local_weight?"),
        ("+objective.alignment.kindd=2", "did you mean kind?"),
        ("+data.taggr=auto", "did you mean tagger?"),
        ("+explainer=grad_cam", "explainer: there is no such key"),
        ("objective.phrase_weight=mx", "got 'mx', expected max or none; did you mean max?"),
        ("objective.explainer.heads=eight", "objective.explainer.heads: got 'eight', expected"),
        ("+data.tagger=ntlk", "expected auto or nltk or textblob; did you mean nltk?"),
        (
            "+objective.terms={a:{_target_:gradeclip_ft.objectives.keep.Keep,text:x}}",
            "terms.a.text: got",
        ),
        ("optim.optimizer.lr=high", "optim.optimizer.lr: got 'high', expected float"),
        ("trainer.precision=bf16-true", "got 'bf16-true', expected"),  # it would fail at step 1
        ("trainer.max_steps=1.5", "trainer.max_steps: got 1.5, expected int"),
        ("optim.train_text=1", "optim.train_text: got 1, expected bool"),
        ("data.batch_size=null", "data.batch_size: got None, expected int"),
        ("objective.explainer=grad_cam", "objective.explainer: got 'grad_cam', expected object"),
        ("evaluation=3", "evaluation: got 3, expected keys below it"),
        ("model._target_=torch.load", "model._target_: torch.load is not built here"),
        ("~model.name", "model.name: load_clip needs it; add +model.name=..."),
        ("seed=${nowhere}", "seed: Interpolation key 'nowhere' not found"),
        ("model=open_clip", "model.name: has no value; add model.name=..."),
        ("evaluation.before={a:1}", "evaluation.before: got keys (a), expected a value"),
        ("+evaluation={1:2}", "evaluation.1: there is no such key"),
        ("~data", "data: is missing; leave out ~data"),
        ("+evaluator.mine=1", "evaluator.mine: 1 is not built here"),
    ],
)
def test_a_mistake_is_named_with_the_likely_intention(override: str, words: str) -> None:
    """Would catch an override that is accepted and read by nobody, or fails a minute later."""
    assert words in complaint(override)


def test_several_mistakes_are_shown_at_once() -> None:
    """Would catch a user who mends one key per start."""
    text = complaint("+optim.typo=1", "trainer.log_every=many", "+seeed=2")
    assert len(text.splitlines()) == 3


def test_values_of_another_choice_are_refused_rather_than_ignored() -> None:
    """Would catch options that are left over when an experiment's choice is replaced."""
    text = complaint("+exp=shapes", "objective=global_only")
    assert "GlobalOnly takes no explainer" in text
    text = complaint("data=coco_captions", "+data.make={folder:x}")
    assert "data.make: its keys (folder) belong to a choice that was replaced" in text


def test_an_evaluator_of_ones_own_may_be_added() -> None:
    """Would catch the check closing the door on new evaluators from the command line."""
    target = "gradeclip_ft.evaluators.regions.RegionEvaluator"
    text = complaint(f"+evaluator.mine={{_target_: {target}, nmae: mine}}")
    assert "evaluator.mine.nmae: RegionEvaluator takes no nmae" in text


@pytest.mark.parametrize("override", ["data=1", "trainer=nan", f"{'a' * 300}=b", "=1", "data=null"])
def test_what_hydra_cannot_even_read_is_a_configuration_error(override: str) -> None:
    """Hydra answers these with a bare ValueError or OSError from its inside."""
    with pytest.raises(ConfigurationError):
        compose("train", [override])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "run"),
        (["+exp=cc3m_vitb16"], "cc3m_vitb16"),
        (["+exp/maps=uniform", "seed=3"], "maps_uniform"),
        (["+exp=smoke", "name=try"], "try"),
    ],
)
def test_a_run_is_called_as_its_experiment(overrides: list[str], name: str) -> None:
    """Would catch `train +exp=cc3m_vitb16` that asks for a name."""
    assert compose("train", overrides).name == name


def test_the_job_of_a_sweep_adds_its_own_values() -> None:
    assert run_name({"model": "x", "exp/maps": "uniform", "exp": None}, "_0") == "maps_uniform_0"
    assert run_name({"exp": ["a", "b"]}) == "a_b"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int", [1, 0], [1.5, True, "1", None]),
        ("float", [1, 1.5], [True, "1e-5", None]),
        ("bool", [True], [1, "true"]),
        (["str", "null"], ["a", None], [1, ["a"], {"_target_": "x"}]),
        ({"choices": ["one", "all"]}, ["one"], ["two", None, 1]),
        ([{"choices": [1, 2]}, "null"], [1, None], [3, True, "1"]),
        ({"list": "float"}, [[0.9, 0.98], []], [0.9, ["a"], "ab", [{"_target_": "x"}]]),
        ({"dict": "int"}, [{"a": 1}, {}], [{"a": "b"}, [1], {"_target_": "x"}]),
        ({"dict": "object"}, [{"a": {"_target_": "x"}}, {}], [{"a": 1}, {"_target_": "x"}]),
        (["object", "null"], [{"_target_": "x"}, None], ["anything", {"a": 1}]),
        ("any", [1, "a", {"a": [1]}], [{"_target_": "x"}, {"a": [{"_target_": "x"}]}]),
    ],
)
def test_values_are_judged_by_their_type(kind: Any, good: list[Any], bad: list[Any]) -> None:
    """Would catch a wrong word that surfaces after a minute of loading, or code among data."""
    assert [value for value in good if not fits(value, kind)] == []
    assert [value for value in bad if fits(value, kind)] == []


def test_types_are_read_from_signatures() -> None:
    """Would catch an annotation that the list of targets leaves out or misreads."""
    sources = targets()["gradeclip_ft.data.captions.CaptionTrainData"]["arguments"]
    assert sources["tagger"] == {"type": {"choices": ["auto", "nltk", "textblob"]}}
    assert sources["shards"] == {"type": ["str", {"list": "str"}], "required": True}
    assert sources["make"] == {"type": ["object", "null"]}
    assert plugins.plain_type(dict[str, Path | None]) == {"dict": ["str", "null"]}


@pytest.mark.parametrize(
    ("arrived", "line"),
    [
        ("captions=[a man's hat, dog]", 'captions=["a man\'s hat",dog]'),
        ("images=photos/my (1).jpg", 'images="photos/my (1).jpg"'),
        ("captions=a dog, running", 'captions="a dog, running"'),
        ("phrases=[dog", "phrases=[...]"),
    ],
)
def test_the_line_that_the_shell_spoiled_is_printed_so_that_it_works(
    arrived: str, line: str
) -> None:
    """Would catch a hint that fails as well when it is pasted."""
    with pytest.raises(ConfigurationError) as told:
        compose("explain", ["images=a", arrived])
    shown = str(told.value).rpartition("write ")[2].partition(" for one text")[0]
    assert shlex.split(shown) == [line]
    if "..." not in line:
        cfg = compose("explain", ["images=a", *shlex.split(shown)])
        key, _, value = arrived.partition("=")
        whole = [text.strip() for text in value[1:-1].split(",")] if "[" in value else value
        assert cfg[key] == whole
