"""The public interface: photos and models as users have them, and maps where they belong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn

import gradeclip_ft
from gradeclip_ft.commands.config import ConfigurationError
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import LoadedClip, Preprocessing
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.results.record import Measured

mpl.use("Agg")
TEXTS = ["a red circle", "a blue star"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedClip:
    monkeypatch.chdir(tmp_path)
    return gradeclip_ft.load("shapes_tiny", device="cpu")


def scene() -> Image.Image:
    """90 x 60 pixels with a red square."""
    picture = Image.new("RGB", (90, 60), (128, 128, 128))
    picture.paste((220, 20, 20), (50, 20, 70, 40))
    return picture


def test_the_package_is_imported_without_torch() -> None:
    """And says what there is to use; a function and the package of one name are no trap."""
    program = (
        "import sys, gradeclip_ft\n"
        "assert 'torch' not in sys.modules and {'load', 'explain'} <= set(dir(gradeclip_ft))\n"
        "import gradeclip_ft.explain.driver\n"
        "print(callable(gradeclip_ft.explain), callable(gradeclip_ft.load))\n"
        "gradeclip_ft.unknown"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "has no attribute 'unknown'" in done.stderr


@dataclass(frozen=True)
class Brightness:
    """Not an explanation: the mean of every patch, which says where it is on a ramp."""

    images_only: bool = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.mean(1, keepdim=True), tower.patch).squeeze(1)[owner]


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash", "aspect"])
@pytest.mark.parametrize("size", [(126, 85), (85, 126), (101, 100), (40, 24)])
def test_a_map_lies_on_the_photo_as_its_pixels_did(
    tiny: LoadedClip, resize: Any, size: tuple[int, int]
) -> None:
    """Two ramps are drawn, so that a value of a map says where it was seen: within half a pixel.

    Bilinear maps keep a ramp as it is, except near the edge of what was seen.
    """
    plain = Preprocessing((0.0,) * 3, (1.0,) * 3, resize="squash" if resize == "aspect" else resize)
    model = replace(tiny, preprocessing=plain)
    width, height = size
    for axis, length in ((1, width), (0, height)):
        grey = 255 // (length - 1)  # levels for a pixel
        steps = grey * np.arange(length, dtype=np.uint8)
        photo = np.broadcast_to(steps[None] if axis else steps[:, None], (height, width))
        (found,) = gradeclip_ft.explain(
            model,
            Image.fromarray(np.stack([photo] * 3, 2)),
            "x",
            {"ramp": Brightness()},
            geometry="aspect" if resize == "aspect" else "model",
        )
        (heat,) = 255 / grey * found.on_photo().double()
        assert heat.shape == (height, width)
        seen = ~heat.isnan()
        scale = found.found.seen.placement.scale
        # Half a patch and the filter of the resize; beside padding also the patch that it is in.
        edge = 12.5 if resize == "longest" else 4.5
        margin = [int(np.ceil(edge / each)) for each in scale]
        rows, columns = seen.any(1).nonzero().ravel(), seen.any(0).nonzero().ravel()
        inside = heat[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert not inside.isnan().any()
        inner = (slice(margin[0], -margin[0]), slice(margin[1], -margin[1]))
        truth = torch.from_numpy(photo.copy()).double() / grey
        truth = truth[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (inside[inner] - truth[inner]).abs().max() < 0.5
        cut = seen.logical_not().sum()
        assert cut == 0 if resize != "shortest" else cut <= abs(width - height) * min(size)
        if resize == "shortest":
            assert cut >= (abs(width - height) - 2) * min(size)


@pytest.mark.parametrize("resize", ["shortest", "longest"])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_marked_corner_lands_on_its_corner(
    tiny: LoadedClip, resize: Any, corner: tuple[int, int], tmp_path: Path
) -> None:
    """White where the model still sees the photo; turned by EXIF as photos of telephones are."""
    model = replace(tiny, preprocessing=Preprocessing((0.0,) * 3, (1.0,) * 3, resize=resize))
    photo = np.full((120, 300), 60, dtype=np.uint8)
    left, right = (90, 210) if resize == "shortest" else (0, 300)
    row = slice(0, 30) if corner[0] == 0 else slice(90, 120)
    column = slice(left, left + 30) if corner[1] == 0 else slice(right - 30, right)
    photo[row, column] = 255
    stored = Image.fromarray(photo).transpose(Image.Transpose.ROTATE_90)  # undone by 6
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    (found,) = gradeclip_ft.explain(model, tmp_path / "turned.png", "x", {"b": Brightness()})
    assert found.photo.size == (300, 120)
    (heat,) = found.on_photo()
    peak = divmod(int(heat.nan_to_num(-1).argmax()), 300)
    assert row.start <= peak[0] < row.stop
    assert column.start <= peak[1] < column.stop


def test_a_model_in_memory_explains_as_the_one_by_name(tiny: LoadedClip) -> None:
    """The pixels, the texts and the maps; the model stays in training mode, if it was."""
    module = tiny.clip.model.train()
    how = tiny.preprocessing
    preprocess = image_transform(64, is_train=False, mean=how.mean, std=how.std)
    model = gradeclip_ft.from_open_clip(module, preprocess, tiny.tokenizer.tokenize)
    assert model.clip.model is module
    ours, theirs = (
        gradeclip_ft.explain(one, [scene(), scene()], TEXTS, ["grad_eclip", "game"])
        for one in (tiny, model)
    )
    for method in ("grad_eclip", "game"):
        torch.testing.assert_close(theirs[1].heat[method], ours[1].heat[method])
    torch.testing.assert_close(theirs[0].score, ours[0].score)
    assert module.training


@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_every_transform_of_open_clip_is_understood(
    tiny: LoadedClip, mode: str, size: int | tuple[int, int]
) -> None:
    """Against its own pixels, on photos of other sizes than those it is tried with."""
    preprocess = image_transform(size, is_train=False, resize_mode=mode, interpolation="bilinear")
    if mode == "shortest" and size == (32, 48):  # open_clip forgets the interpolation here
        preprocess = image_transform(size, is_train=False)
    model = gradeclip_ft.from_open_clip(tiny.clip.model, preprocess, tiny.tokenizer.tokenize)
    for width, height in ((90, 60), (60, 90), (200, 33), (7, 5)):
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        photo = Image.fromarray(noise)
        torch.testing.assert_close(model.transform()(photo), preprocess(photo), atol=1e-5, rtol=0)


def test_a_model_that_would_be_misread_is_refused(tiny: LoadedClip) -> None:
    module, tokenize = tiny.clip.model, tiny.tokenizer.tokenize
    good = image_transform(64, is_train=False)
    for bad in (
        image_transform(64, is_train=True),
        image_transform(64, is_train=False, resize_mode="longest", fill_color=128),
        lambda image: torch.zeros(3, 64, 64),
    ):
        with pytest.raises(ValueError, match="not what open_clip's"):
            gradeclip_ft.from_open_clip(module, bad, tokenize)
    with pytest.raises(ValueError, match="model is a Linear, expected one of open_clip's"):
        gradeclip_ft.from_open_clip(nn.Linear(2, 2), good, tokenize)
    with pytest.raises(ValueError, match=r"torch.float16.*give model.float\(\)"):
        gradeclip_ft.from_open_clip(module.half(), good, tokenize)


def test_methods_by_name_and_by_object(tiny: LoadedClip) -> None:
    mine = {"mine": GradEclip(heads="all"), "theirs": GradEclip()}
    (one,) = gradeclip_ft.explain(tiny, scene(), TEXTS, mine)
    (two,) = gradeclip_ft.explain(tiny, scene(), TEXTS, ["rollout", GradEclip(heads="all")])
    (three,) = gradeclip_ft.explain(tiny, scene(), TEXTS, "grad_eclip")
    assert list(two.heat) == ["rollout", "GradEclip"]
    assert torch.equal(one.heat["mine"], two.heat["GradEclip"])
    assert torch.equal(one.heat["theirs"], three.heat["grad_eclip"])
    with pytest.raises(ConfigurationError, match="did you mean grad_eclip"):
        gradeclip_ft.explain(tiny, scene(), TEXTS, ["grad_eclyp"])
    with pytest.raises(ValueError, match="with different names"):
        gradeclip_ft.explain(tiny, scene(), TEXTS, [GradEclip(), GradEclip(heads="all")])
    with pytest.raises(ValueError, match="texts are empty"):
        gradeclip_ft.explain(tiny, scene(), [])
    with pytest.raises(ValueError, match="images are empty"):
        gradeclip_ft.explain(tiny, [], TEXTS)
    with pytest.raises(ValueError, match="geometry is 'letterbox', expected model or aspect"):
        gradeclip_ft.explain(tiny, scene(), TEXTS, geometry="letterbox")


def test_what_is_not_read_of_a_text_is_said(
    tiny: LoadedClip, caplog: pytest.LogCaptureFixture
) -> None:
    """By a tokenizer that knows words; another one, of a user's own, explains all the same."""
    long = "red " * 40 + "the end"
    gradeclip_ft.explain(tiny, scene(), long)
    assert "leaves out" in caplog.text
    assert "the end" in caplog.text
    own = replace(tiny.tokenizer, tokenize=lambda texts: tiny.tokenizer.tokenize(texts))
    (found,) = gradeclip_ft.explain(replace(tiny, tokenizer=own), scene(), TEXTS)
    assert found.score.isfinite().all()


def test_a_program_around_may_use_hydra(tiny: LoadedClip, tmp_path: Path) -> None:
    """Would catch names that cannot be looked up in a research script under `@hydra.main`."""
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert gradeclip_ft.explain(tiny, scene(), "x", "rollout")[0].heat.keys() == {"rollout"}
        assert GlobalHydra.instance().hydra is before


def test_files_pictures_and_tensors_on_page_and_axes(tiny: LoadedClip, tmp_path: Path) -> None:
    scene().save("scene.png")
    pixels = tiny.transform()(scene())
    found = gradeclip_ft.explain(
        tiny, ["scene.png", scene(), pixels], TEXTS, ["grad_eclip", "rollout"]
    )
    assert torch.equal(found[0].heat["rollout"], found[2].heat["rollout"])
    assert found[0].on_photo("rollout").shape == (2, 60, 90)
    assert found[2].on_photo().shape == (2, 64, 64)
    torch.testing.assert_close(found[2].on_photo(), found[2].found.at_pixels("grad_eclip"))
    axes = found[0].plot()
    assert axes.shape == (2, 2)
    assert axes[0, 0].images[0].get_array().shape == (60, 90, 3)
    assert axes[1, 1].images[1].get_array().shape == (60, 90)
    assert axes[0, 1].get_title().startswith("a blue star  ")
    assert found[2].plot().shape == (2, 2)
    page = found.save(tmp_path / "pages" / "all.html").read_text()
    assert page.count("a blue star") >= 3
    assert "scene.png" in page
    assert "picture 2" in page
    assert "picture 2" not in found[0].save("one.html").read_text()


def test_dense_features_give_the_cosine_of_patch_and_text(tiny: LoadedClip) -> None:
    features = gradeclip_ft.dense(tiny, [scene(), scene()])
    assert features.shape[:3] == (2, 8, 8)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 8, 8))
    (found,) = gradeclip_ft.explain(tiny, scene(), TEXTS, ["maskclip"])  # its positive part
    cosine = features[0] @ tiny.encode_texts(TEXTS).T
    torch.testing.assert_close(cosine.permute(2, 0, 1).relu(), found.heat["maskclip"])


def test_region_embeddings_are_those_of_the_evaluation(tiny: LoadedClip, tmp_path: Path) -> None:
    """Boxes as a user has them, in corners and pixels of the photo, against COCO's."""
    scene().save("scene.png")
    boxes = [[50.0, 20.0, 20.0, 20.0], [0.0, 0.0, 90.0, 60.0], [71.5, 3.0, 18.5, 30.0]]
    content = {
        "images": [{"id": 1, "file_name": "scene.png", "width": 90, "height": 60}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
            for n, box in enumerate(boxes)
        ],
    }
    Path("boxes.json").write_text(json.dumps(content))
    data = CocoRegions(annotations="boxes.json", images=".", min_area=0)
    regions = data(image_size=64, patch=8, mean=tiny.mean, std=tiny.std, crop_size=None)
    (batch,) = regions.batches(1, 0)
    with torch.no_grad():
        dense = tiny.clip.image.trace(batch.images).dense()
        wanted = pool_boxes(dense, batch.boxes, batch.owner)
    corners = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    found = gradeclip_ft.region_embeddings(tiny, "scene.png", corners)
    torch.testing.assert_close(found, wanted)
    assert gradeclip_ft.region_embeddings(tiny, scene(), np.array(corners)[:1]).shape[0] == 1
    for bad in ([[50, 20, 20, 40]], [[0, 0, 91, 60]], [[-1, 0, 5, 5]]):
        with pytest.raises(ValueError, match="is not inside the photo of 90 x 60 pixels"):
            gradeclip_ft.region_embeddings(tiny, scene(), bad)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(R, 4\)"):
        gradeclip_ft.region_embeddings(tiny, scene(), corners[0])


@dataclass(frozen=True)
class Share:
    """An evaluator of somebody's own: how many parameters are positive."""

    name: str = "share"
    protocol: dict[str, Any] = None  # type: ignore[assignment]

    def prepare(self) -> None:
        Path("prepared").touch()

    def __call__(self, loaded: LoadedClip, *, track: Any = None) -> Measured:
        assert not loaded.clip.training
        assert not torch.is_grad_enabled()
        every = torch.cat([p.flatten() for p in loaded.clip.parameters()])
        return Measured({"positive": float((every > 0).float().mean())}, {}, {})


def test_evaluators_by_name_with_settings_and_by_object(tiny: LoadedClip) -> None:
    few = ("methods=[grad_eclip]", "rounds=2", "warm_up=1")
    metrics = gradeclip_ft.evaluate(tiny, "timing", *few).metrics
    assert metrics["grad_eclip/seconds"] > 0
    assert not [name for name in metrics if name.startswith("rise")]
    assert 0.1 < gradeclip_ft.evaluate(tiny, Share(protocol={})).metrics["positive"] < 0.9
    assert Path("prepared").exists()
    with pytest.raises(ConfigurationError, match="did you mean timing"):
        gradeclip_ft.evaluate(tiny, "timings")
    with pytest.raises(ConfigurationError, match="takes no round; did you mean rounds"):
        gradeclip_ft.evaluate(tiny, "timing", "round=3")


def test_a_run_is_loaded_by_name_folder_and_file(tiny: LoadedClip, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "runs" / "try"
    folder.mkdir(parents=True)
    model = "_target_: gradeclip_ft.models.load.load_clip\n  name: shapes_tiny"
    (folder / "config.yaml").write_text(f"model:\n  {model}\n")
    state = {name: value.clone() for name, value in tiny.clip.model.state_dict().items()}
    state["logit_scale"] += 1
    save_file(state, folder / "weights.safetensors", metadata={"step": "3"})
    for name in ("try", "runs/try", folder, folder / "weights.safetensors"):
        found = gradeclip_ft.load(name, device="cpu")
        assert found.clip.log_scale == tiny.clip.log_scale + 1
    with pytest.raises(ValueError, match="unknown model 'shapes_tinny'; did you mean shapes_tiny"):
        gradeclip_ft.load("shapes_tinny")
