"""What an export says about itself is what is known, and no more."""

from dataclasses import replace

import pytest
import yaml

from gradeclip_ft.export.card import Origin, licence_of, scores_of
from gradeclip_ft.export.export import write_export
from gradeclip_ft.results.record import Result

RESULT = Result(
    evaluator="regions",
    metrics={"boxes/top1": 0.25, "boxes/top5": 0.5},
    protocol={},
    data={},
    weights={"name": "shapes_tiny", "hash": "of the run"},
    versions={},
)


def origin(before: Result | None, after: Result | None) -> Origin:
    return Origin(start="packaged", run="mine", step=9, scores={"regions": (before, after)})


def text_of(loaded, folder, origin, **options) -> str:
    write_export(loaded, "openclip", folder, origin, **options)
    return (folder / "README.md").read_text()


def test_the_table_holds_both_ends_of_the_run(packaged, tmp_path) -> None:
    own = {"hash": packaged.weights_hash}
    after = replace(RESULT, metrics={"boxes/top1": 0.375, "rise/seconds": 2.5}, step=9, weights=own)
    text = text_of(packaged, tmp_path / "out", origin(RESULT, after))
    assert "| regions: boxes/top1 | % | 25.0 | 37.5 | 9 |" in text
    assert "| regions: rise/seconds | s |  | 2.5000 | 9 |" in text
    assert "not of exactly these weights" not in text
    assert "| run | mine, step 9 |" in text


def test_numbers_of_other_weights_are_called_so(packaged, tmp_path) -> None:
    """Mixed or earlier weights must not go out under the run's numbers."""
    text = text_of(packaged, tmp_path / "out", origin(None, replace(RESULT, step=4)))
    assert "| regions: boxes/top1 | % |  | 25.0 | 4 |" in text
    assert "not of exactly these weights" in text


def test_weights_without_results_say_so_and_their_licence_in_yaml(packaged, tmp_path) -> None:
    text = text_of(packaged, tmp_path / "out", Origin(start="packaged"), half=True)
    matter = yaml.safe_load(text.split("---")[1])
    assert (matter["license"], matter["library_name"]) == ("apache-2.0", "open_clip")
    assert "local-dir:" in text
    assert "Not evaluated." in text
    assert "| precision | float16 |" in text


def test_the_card_tells_nothing_of_the_disk(packaged, tmp_path) -> None:
    """A card is published; folders of the machine it was written on are nobody's business."""
    place = replace(packaged.architecture, name=str(tmp_path / "model"))
    loaded = replace(packaged, architecture=place)
    text = text_of(loaded, tmp_path / "out", Origin(start=str(tmp_path / "start.pt")))
    assert "| architecture | model at" in text
    assert "| start weights | start.pt |" in text
    assert str(tmp_path) not in text


def test_first_and_newest_results_of_a_run(tmp_path) -> None:
    """Steps are numbers: 1000 is newer than 200."""
    for step in (0, 200, 1000):
        metrics = {"boxes/top1": step / 1000}
        replace(RESULT, step=step, metrics=metrics).write(tmp_path / "evaluations")
    assert [result and result.step for result in scores_of(tmp_path)["regions"]] == [0, 1000]
    assert scores_of(tmp_path / "evaluations" / "none") == {}
    weights = {**RESULT.weights, "alpha": 0.85}
    replace(RESULT, step=1000, weights=weights).write(tmp_path / "evaluations")
    for alpha in (1.0, 0.85, 0.7):
        _, after = scores_of(tmp_path, alpha)["regions"]
        assert after is not None
        assert (after.step, after.alpha) == (1000, 0.85 if alpha == 0.85 else 1.0)


@pytest.mark.parametrize(
    ("model", "weights", "licence"),
    [
        ("ViT-B-16-quickgelu", "openai", "mit"),
        ("ViT-B-32", "laion2b_s34b_b79k", "mit"),
        ("EVA02-B-16", "merged2b_s8b_b131k", "mit"),
        ("EVA02-E-14-plus", "laion2b_s9b_b144k", "mit"),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", "mit"),
        ("ViT-B-16-SigLIP2", "webli", "apache-2.0"),
        ("ViT-H-14-quickgelu", "dfn5b", "other"),
        ("ViT-B-16-quickgelu", "metaclip_400m", "cc-by-nc-4.0"),
        ("MobileCLIP-S1", "datacompdr", "unknown"),
        ("ViT-B-16", "/data/mine.pt", "unknown"),
        ("ViT-B-16", "random", "unknown"),
    ],
)
def test_licences_that_are_not_known_are_not_guessed(model, weights, licence) -> None:
    assert licence_of(model, weights)[0] == licence
