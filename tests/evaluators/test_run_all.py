"""Several evaluators on one model: files, what is kept, what is refused."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from gradeclip_ft.evaluators.base import Track, evaluating, prepare, run_all, untracked
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, read
from tests.evaluators.conftest import Load, modes


@dataclass
class Counting:
    """An evaluator that counts its calls."""

    name: str = "counting"
    protocol: dict[str, Json] = field(default_factory=lambda: {"size": 7})
    calls: int = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        self.calls += 1
        assert not loaded.clip.training
        return Measured({"top1": 0.5}, {**self.protocol, "classes": 3}, {"hash": "x"})


def test_each_evaluator_writes_its_file_with_weights_and_versions(
    load: Load, tmp_path: Path
) -> None:
    loaded, one, two = load(), Counting("one"), Counting("two")
    run_all({"a": one, "b": two}, loaded, folder=tmp_path, run="r", step=30, command="c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one@30.json", "two@30.json"]
    result = read(tmp_path / "two@30.json")
    assert result.metrics == {"top1": 0.5}
    assert (result.run, result.step, result.command) == ("r", 30, "c")
    assert result.weights == {"name": "fake", "hash": loaded.weights_hash}
    assert {"torch", "gradeclip_ft", "python"} <= set(result.versions)


def test_results_of_the_same_weights_are_kept_on_request(load: Load, tmp_path: Path) -> None:
    loaded, evaluator, seen = load(), Counting(), []

    def run(again: bool) -> None:
        run_all(
            {"a": evaluator},
            loaded,
            folder=tmp_path,
            again=again,
            done=lambda result, fresh: seen.append(fresh),
        )

    run(again=False)
    run(again=False)
    run(again=True)
    assert evaluator.calls == 2
    assert seen == [True, False, True]


def test_results_of_other_weights_or_settings_are_not_taken_for_these(
    load: Load, tmp_path: Path
) -> None:
    """Skipping by name alone would print the numbers of another model."""
    loaded, evaluator = load(), Counting()
    run_all({"a": evaluator}, loaded, folder=tmp_path)
    other = Counting(protocol={"size": 8})
    with pytest.raises(ValueError, match=r"counting@0.json exists and differs in size; again=true"):
        run_all({"a": other}, loaded, folder=tmp_path, again=False)
    with torch.no_grad():
        loaded.clip.log_scale.add_(1.0)
    with pytest.raises(ValueError, match="differs in hash"):
        run_all({"a": evaluator}, loaded, folder=tmp_path, again=False)


def test_a_result_on_a_file_that_has_changed_is_not_kept(load: Load, tmp_path: Path) -> None:
    """Class names in a file of the data are not in the protocol."""
    names = tmp_path / "classnames.txt"
    names.write_text("cat\ndog\n")
    fingerprint = data_fingerprint([names], [], {"images": 2})

    class OnData(Counting):
        def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
            return replace(super().__call__(loaded), data=fingerprint)

    loaded, evaluator = load(), OnData()
    for again in (True, False):
        run_all({"a": evaluator}, loaded, folder=tmp_path / "e", again=again)
    names.write_text("dog\ncat\n")
    with pytest.raises(ValueError, match=r"differs in .*classnames.txt; again=true"):
        run_all({"a": evaluator}, loaded, folder=tmp_path / "e", again=False)
    assert evaluator.calls == 1


def test_what_has_no_prepare_is_not_asked_to() -> None:
    """Data of a plug-in may be a folder's name; its own prepare comes before that of its data."""
    prepared: list[str] = []
    source = SimpleNamespace(prepare=lambda: prepared.append("data"))

    class Plain:
        name = "plain"
        protocol: ClassVar[dict[str, Json]] = {}
        data: object = "/some/folder"

        def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
            raise NotImplementedError

    class OnSource(Plain):
        data = source

    class Own(OnSource):
        def prepare(self) -> None:
            prepared.append("own")

    for evaluator in (Plain(), OnSource(), Own()):
        prepare(evaluator)
    assert prepared == ["data", "own"]


def test_two_evaluators_of_one_name_are_refused(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different names"):
        run_all({"a": Counting(), "b": Counting()}, load(), folder=tmp_path)


def test_modes_come_back_after_an_error(load: Load) -> None:
    clip = load().clip
    before = modes(clip)

    def fail() -> None:
        with evaluating(clip):
            assert not any(modes(clip))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert modes(clip) == before


def test_half_precision_is_part_of_the_protocol(load: Load, tmp_path: Path) -> None:
    """Numbers of another precision are neither kept nor compared silently; the hash stays."""
    loaded, evaluator = load(), Counting()
    before = loaded.weights_hash
    (result,) = run_all({"a": evaluator}, loaded, folder=tmp_path, precision="bfloat16")
    assert next(loaded.clip.parameters()).dtype == torch.bfloat16
    assert result.protocol["precision"] == "bfloat16"
    assert result.weights["hash"] == before
    with pytest.raises(ValueError, match="precision; again=true"):
        run_all({"a": evaluator}, load(), folder=tmp_path, again=False)
