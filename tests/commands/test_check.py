"""A configuration that composes may still be nonsense; it is refused before torch is imported."""

import pytest

from gradeclip_ft.commands.config import ConfigurationError, check, compose


def complaint(*overrides: str, command: str = "train") -> str:
    """What the check says about these overrides."""
    with pytest.raises(ConfigurationError) as caught:
        check(compose(command, ["name=a", *overrides]), command)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optim.optimizer.lrr=1", "optim.optimizer.lrr: adamw takes no lrr; did you mean lr?"),
        ("+seeed=1", "seeed: there is no such key; did you mean seed?"),
        ("+evaluation.evry=1", "evaluation.evry: there is no such key; did you mean every?"),
        ("+objective.local_wieght=2", "did you mean local_weight?"),
        ("+objective.alignment.gama=2", "did you mean gamma?"),
        ("+data.taggr=auto", "did you mean tagger?"),
        ("+explainer=grad_cam", "explainer: there is no such key"),
        ("objective.phrase_weight=mx", "got 'mx', expected one of max, none; did you mean max?"),
        ("objective.explainer.heads=eight", "objective.explainer.heads: got 'eight', expected"),
        ("+data.tagger=ntlk", "expected one of auto, nltk, textblob; did you mean nltk?"),
        ("optim.optimizer.lr=high", "optim.optimizer.lr: got 'high', expected float"),
        ("trainer.max_steps=1.5", "trainer.max_steps: got 1.5, expected int"),
        ("optim.train_text=1", "optim.train_text: got 1, expected bool"),
        ("data.batch_size=null", "data.batch_size: got None, expected int"),
        ("objective.explainer=grad_cam", "objective.explainer: got 'grad_cam', expected Explainer"),
        ("model._target_=torch.load", "torch.load is not in gradeclip_ft"),
        ("~model.name", "model.name: load_clip needs it; add +model.name=..."),
        ("seed=${nowhere}", "seed: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_mistake_is_named_with_the_likely_intention(override: str, words: str) -> None:
    """Would catch an override that is accepted and read by nobody, or fails a minute later."""
    assert words in complaint(override)


def test_a_value_left_open_is_asked_for() -> None:
    """Would catch `???` that surfaces as a foreign error in the middle of the start."""
    with pytest.raises(ConfigurationError, match=r"name: has no value; add name=\.\.\."):
        check(compose("train", []), "train")
    assert "model.name: has no value" in complaint("model=open_clip")


def test_several_mistakes_are_shown_at_once() -> None:
    """Would catch a user who mends one key per start."""
    text = complaint("+optim.typo=1", "trainer.log_every=many", "+seeed=2")
    assert len(text.splitlines()) == 3


def test_values_of_another_choice_are_refused_rather_than_ignored() -> None:
    """Would catch options of Grad-ECLIP that stay behind when the objective has no map."""
    text = complaint("+exp=shapes", "objective=global_only")
    assert "GlobalOnly takes no explainer" in text


def test_arguments_given_at_run_time_are_not_missed_in_partial_nodes() -> None:
    """Would catch a demand for the tokenizer in yaml."""
    check(compose("train", ["name=a"]), "train")


def test_an_evaluator_of_ones_own_may_be_added() -> None:
    """Would catch the check closing the door on new evaluators from the command line."""
    target = "gradeclip_ft.evaluators.regions.RegionEvaluator"
    text = complaint(f"+evaluator.mine={{_target_: {target}, nmae: mine}}")
    assert "evaluator.mine.nmae: RegionEvaluator takes no nmae" in text


@pytest.mark.parametrize("override", ["data=1", "trainer=nan", f"{'a' * 300}=b", "=1"])
def test_what_hydra_cannot_even_read_is_a_configuration_error(override: str) -> None:
    """Hydra answers these with a bare ValueError or OSError from its inside."""
    with pytest.raises(ConfigurationError):
        compose("train", ["name=a", override])
