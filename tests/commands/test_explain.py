"""`explain` from files to files, on the packaged model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.config import ConfigurationError, check, compose, options
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
    cfg = compose("explain", COMMANDS["explain"].overrides(overrides))
    check(cfg, "explain")
    explain(cfg)


def test_pictures_arrays_words_and_page_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Several pictures of awkward kinds, phrases and methods at once."""
    run("images=photos", "phrases=[red square,blue star]", "explainer=[grad_eclip,rollout]")
    assert capsys.readouterr().out.strip() == "explanations/index.html"
    for name in "abc":
        folder = Path("explanations") / name
        arrays = np.load(folder / "maps.npz")
        assert arrays["phrases"].tolist() == ["red square", "blue star"]
        assert arrays["grad_eclip"].shape == arrays["rollout"].shape == (2, 8, 8)
        assert arrays["score"].shape == (2,)
        with Image.open(folder / "red-square-grad_eclip.png") as overlay:
            assert overlay.size == (64, 64)
        first, second = json.loads((folder / "words.json").read_text())
        assert first["words"] == ["a", "photo", "of", "a", "red", "square"]
        assert second["words"][-2:] == ["blue", "star"]
        assert list(first["values"]) == ["grad_eclip", "rollout"]
        assert sum(first["values"]["rollout"]) == pytest.approx(1, abs=1e-4)
    page = Path("explanations/index.html").read_text()
    assert "blue star" in page
    assert 'title="square: ' in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_one_command_draws_every_method() -> None:
    """Catches a method that is defined for this model and does not run on it by its own yaml."""
    run(
        "images=photos/a.png",
        "phrases=[red square]",
        "explainer=all",
        "explainer.rise.masks=8",
        "explainer.integrated_gradients.steps=2",
        "per_head=true",
        "picture=sheet.png",
    )
    arrays = np.load("explanations/a/maps.npz")
    methods = set(options("explainer")) - {"uniform", "grad_eclip_text"}
    assert methods | {"head 0", "head 1", "head 2"} == set(arrays) - {"phrases", "score"}
    (words,) = json.loads(Path("explanations/a/words.json").read_text())
    assert set(words["values"]) == {"grad_eclip", "raw_attention", "rollout", "game", "m2ib"}
    with Image.open("sheet.png") as sheet:
        assert sheet.height > sheet.width
    assert "masks 8" in Path("explanations/index.html").read_text()


def test_an_option_of_one_method_changes_its_map_alone() -> None:
    both = ("images=photos/a.png", "phrases=[red square]", "explainer=[grad_eclip,raw_attention]")
    run(*both)
    run(*both, "explainer.grad_eclip.heads=all", "out=other")
    before, after = np.load("explanations/a/maps.npz"), np.load("other/a/maps.npz")
    assert not np.allclose(before["grad_eclip"], after["grad_eclip"])
    assert np.array_equal(before["raw_attention"], after["raw_attention"])


@pytest.mark.parametrize(
    ("size", "shortest", "grid"),
    [
        ((96, 64), 640, (8, 12)),  # as it is
        ((100, 60), 640, (8, 13)),  # 12.5 and 7.5 patches: both up, also to an uneven number
        ((960, 80), 640, (10, 120)),  # the shorter side counts alone
        ((96, 64), 32, (4, 6)),
        ((96, 3), 640, (1, 12)),
    ],
)
def test_the_whole_picture_in_multiples_of_the_patch(
    size: tuple[int, int], shortest: int, grid: tuple[int, int]
) -> None:
    """As published: int(side / patch + 0.5), the shorter side at most 640 pixels."""
    Image.new("RGB", size, "green").save("a.png")
    run("images=a.png", "phrases=[x]", "geometry=aspect", f"shortest={shortest}")
    assert np.load("explanations/a/maps.npz")["grad_eclip"].shape == (1, *grid)


def test_phrases_are_found_in_captions() -> None:
    run("images='photos/*.png'", "captions=[a red square,a big blue star and a circle]")
    assert np.load("explanations/a/maps.npz")["phrases"].tolist() == ["red square"]
    assert np.load("explanations/b/maps.npz")["phrases"].tolist() == ["big blue star", "circle"]
    (words,) = json.loads(Path("explanations/b/words.json").read_text())
    assert words["words"] == ["a", "big", "blue", "star", "and", "a", "circle"]


def test_what_does_not_fit_into_the_context_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caption = "a red square " + "and a blue star " * 9 + "at the end"
    run("images=photos/a.png", f"captions=['{caption}']")
    (words,) = json.loads(Path("explanations/a/words.json").read_text())
    assert words["cut"].endswith("at the end")
    assert len(words["words"]) == 30
    assert "Not read, because" in Path("explanations/index.html").read_text()
    assert "at the end" in caplog.text


def test_words_that_the_model_does_not_know_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    run("images=photos", "phrases=[red dog,red cat]")
    assert caplog.text.count("17 % of those here (dog, cat) are others") == 1
    caplog.clear()
    run("images=photos", "phrases=[red square]")
    assert "are others" not in caplog.text


@pytest.mark.parametrize("text", ["🙂", "ein rotes Quadrat", "日本", "<b>&"])
def test_any_script_is_taken(text: str) -> None:
    """Words that the model does not know, or none at all: a map is drawn, nothing breaks."""
    run("images=photos/a.png", f"phrases=['{text}']")
    assert np.load("explanations/a/maps.npz")["grad_eclip"].shape == (1, 8, 8)
    assert "<b>&" not in Path("explanations/index.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("images=photos/no.jpg phrases=[dog]", "images=photos/no.jpg: no such picture"),
        (
            "images=album phrases=[dog]",
            r"the pictures are in folders below .1.; write images='album/\*\*/\*\.JPG'",
        ),
        ("images=photos phrases=[dog] explainer=[gradcam]", "did you mean grad_cam"),
        ("images=photos phrases=[dog] explainer=[uniform]", "shows nothing"),
        ("images=photos phrases=[dog] explainer.grad_eclip.hads=all", "did you mean"),
        ("images=photos phrases=[dog] explainer.grad_eclip.heads=two", "expected one or all"),
        ("images=photos phrases=['']", "expected texts"),
        ("images=photos phrases=[]", "expected texts"),
        ("images=photos phrases=[null]", "phrases are .None., expected texts"),
        ("images=photos phrases=[dog,[cat]]", "expected texts; write phrases="),
        ("images=photos captions=[dog,null]", "captions are .'dog', None., expected texts"),
        ("images=[null] phrases=[dog]", "images are .None., expected texts"),
        (f"images={'x' * 300}.jpg phrases=[dog]", "no such picture"),
        ("images=photos", "give phrases="),
        ("images=photos phrases=[dog] captions=[dog]", "give phrases="),
        ("images=photos captions=[dog,cat]", "2 captions for 3 pictures"),
        ("images=photos captions=[slowly]", "no phrase with a noun in 'slowly'"),
        ("images=bad.jpg phrases=[dog]", r"bad.jpg cannot be read as an image"),
        ("images=cut.jpg phrases=[dog]", r"cut.jpg cannot be read as an image"),
    ],
)
def test_what_cannot_be_explained_is_named(overrides: str, message: str) -> None:
    Path("album/2019").mkdir(parents=True)
    Path("album/2019/a.JPG").touch()
    Path("bad.jpg").write_text("<html>")
    Path("cut.jpg").write_bytes(Path("photos/c.jpg").read_bytes()[:500])
    with pytest.raises((ValueError, FileNotFoundError, ConfigurationError), match=message):
        run(*overrides.split(" "))


def test_a_run_is_explained_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradeclip_ft.commands.train import train

    train(compose("train", ["+exp=smoke", "name=tuned", "evaluator=[]"]))
    run("images=photos/a.png", "phrases=[red square]")
    before = np.load("explanations/a/maps.npz")["score"]
    run("images=photos/a.png", "phrases=[red square]", "run=tuned")
    assert abs(np.load("explanations/a/maps.npz")["score"] - before) > 1e-4


def test_a_classifier_is_explained_by_class_names(caplog: pytest.LogCaptureFixture) -> None:
    """Logits of classes; a method that needs texts is left out, once for all; words too."""
    Path("classes.txt").write_text("red square\nblue star\ngrey\n")
    for number in range(9):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(f"photos/{number}.png")
    model = "model=classifier model.name=timm:test_vit model.weights=random"
    given = [*model.split(), "model.classes=classes.txt", "images=photos"]
    run(*given, "phrases=[blue star,'2']", "explainer=[grad_eclip,clip_surgery]")
    assert len(list(Path("explanations").glob("*/maps.npz"))) == 12
    arrays = np.load("explanations/a/maps.npz")
    assert arrays["grad_eclip"].ndim == 3
    assert "clip_surgery" not in arrays
    assert caplog.text.count("clip_surgery is left out") == 1
    assert json.loads(Path("explanations/a/words.json").read_text()) == []
    assert "logit" in Path("explanations/index.html").read_text()
    with pytest.raises(ValueError, match="knows classes, not captions"):
        run(*given, "captions=[a red square]")


def test_pictures_and_phrases_of_one_name_keep_their_own_files() -> None:
    """Would catch a second cat.png, or a second emoji, that replaces the first."""
    Path("other").mkdir()
    Image.new("RGB", (64, 64), "blue").save("other/a.png")
    long = "𠀀" * 90  # four bytes each: names of files hold 255
    phrases = f"phrases=['red-circle','red circle','🐶','🚗','{long}']"
    run("images=[photos/a.png,other/a.png]", phrases)
    first, second = (np.load(f"explanations/{name}/maps.npz") for name in ("a", "a-2"))
    assert not np.array_equal(first["grad_eclip"], second["grad_eclip"])
    drawn = sorted(path.name for path in Path("explanations/a").glob("*-grad_eclip.png"))
    assert drawn == [
        "phrase-2-grad_eclip.png",
        "phrase-grad_eclip.png",
        "red-circle-2-grad_eclip.png",
        "red-circle-grad_eclip.png",
        "𠀀" * 15 + "-grad_eclip.png",
    ]


def test_one_broken_picture_of_several_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """An option that no picture bears is not blamed on the pictures."""
    Path("photos/broken.jpg").write_text("<html>")
    Path("photos/link.jpg").symlink_to("nowhere.jpg")
    run("images=photos", "phrases=[red square]")
    assert "broken.jpg cannot be read" in caplog.text
    assert "no image photos/link.jpg" in caplog.text
    with pytest.raises(ValueError, match="shortest is 0"):
        run("images=photos", "phrases=[x]", "geometry=aspect", "shortest=0", "out=other")
    written = sorted(path.name for path in Path("explanations").iterdir())
    assert written == ["a", "b", "c", "index.html"]


def test_a_dollar_and_a_very_wide_picture_are_drawn() -> None:
    Image.new("RGB", (2000, 10), "green").save("wide.png")
    wide = ("images=wide.png", "geometry=aspect", "picture=s.png")
    run(*wide, "phrases=['costs $5_{ $']")
    assert np.load("explanations/wide/maps.npz")["grad_eclip"].shape == (1, 1, 250)
    assert Path("s.png").is_file()
