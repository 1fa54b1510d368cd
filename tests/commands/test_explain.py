"""`explain` from files to files, on the packaged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.compose import compose
from gradeclip_ft.commands.explain import explain


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures: grey with a red square at the lower right, palette, CMYK."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    picture = Image.new("RGB", (96, 64), (128, 128, 128))
    picture.paste((220, 20, 20), (60, 34, 90, 60))
    picture.save("photos/a.png")
    picture.convert("P").save("photos/b.png")
    picture.convert("CMYK").save("photos/c.jpg")
    return tmp_path


def run(*overrides: str) -> None:
    """As typed on the command line."""
    explain(compose("explain", COMMANDS["explain"].overrides(overrides)))


def test_pictures_arrays_and_page_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Several pictures of awkward kinds, phrases and methods at once."""
    run("images=photos", "phrases=[red square,blue star]", "explainer=[grad_eclip,rollout]")
    assert capsys.readouterr().out.strip() == "explanations/index.html"
    for name in "abc":
        folder = Path("explanations") / name
        arrays = np.load(folder / "maps.npz")
        assert arrays["phrases"].tolist() == ["red square", "blue star"]
        assert arrays["grad_eclip"].shape == arrays["rollout"].shape == (2, 8, 8)
        assert arrays["cosine"].shape == (2,)
        with Image.open(folder / "red-square-grad_eclip.png") as overlay:
            assert overlay.size == (64, 64)
    page = Path("explanations/index.html").read_text()
    assert "blue star" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_whole_picture_in_multiples_of_the_patch() -> None:
    """As published: 96 x 64 pixels stay, on a grid of 8 x 12; a longest side shrinks it."""
    run("images=photos/a.png", "phrases=[red square]", "geometry=aspect")
    assert np.load("explanations/a/maps.npz")["grad_eclip"].shape == (1, 8, 12)
    run("images=photos/a.png", "phrases=[x]", "geometry=aspect", "longest=48", "out=small")
    assert np.load("small/a/maps.npz")["grad_eclip"].shape == (1, 4, 6)


def test_phrases_are_found_in_captions() -> None:
    run("images='photos/*.png'", "captions=[a red square,a big blue star and a circle]")
    assert np.load("explanations/a/maps.npz")["phrases"].tolist() == ["red square"]
    assert np.load("explanations/b/maps.npz")["phrases"].tolist() == ["big blue star", "circle"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("images=photos/no.jpg phrases=[dog]", "images=photos/no.jpg: no such picture"),
        ("images=photos phrases=[dog] explainer=[gradcam]", "did you mean grad_cam"),
        ("images=photos phrases=['']", "expected texts"),
        ("images=photos", "give phrases="),
        ("images=photos phrases=[dog] captions=[dog]", "give phrases="),
        ("images=photos captions=[dog,cat]", "2 captions for 3 pictures"),
        ("images=photos captions=[slowly]", "no phrase with a noun in 'slowly'"),
        ("images=bad.jpg phrases=[dog]", "bad.jpg"),
    ],
)
def test_what_cannot_be_explained_is_named(overrides: str, message: str) -> None:
    Path("bad.jpg").write_text("<html>")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*overrides.split())


def test_a_run_is_explained_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradeclip_ft.commands.train import train

    train(compose("train", ["+exp=smoke", "name=tuned", "evaluator=[]"]))
    run("images=photos/a.png", "phrases=[red square]")
    before = np.load("explanations/a/maps.npz")["cosine"]
    run("images=photos/a.png", "phrases=[red square]", "run=tuned")
    assert abs(np.load("explanations/a/maps.npz")["cosine"] - before) > 1e-4
