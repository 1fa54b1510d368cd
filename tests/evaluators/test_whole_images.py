"""Zero-shot classification and the choice of captions, on files in their public layouts."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.data.labelled import ClassFolders, ClassShards
from gradeclip_ft.data.pairs import CaptionChoices
from gradeclip_ft.evaluators.base import run_all
from gradeclip_ft.evaluators.pairs import ChoiceEvaluator
from gradeclip_ft.evaluators.zero_shot import ZeroShotEvaluator
from tests.evaluators.conftest import Load, colour_of, said_to

LABELS = (0, 0, 0, 1, 2, 2)
PLAIN = ["a photo of a {}."]


def picture(label: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour_of(label)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> ClassFolders:
    """17 classes, three of them with 3, 1 and 2 images."""
    for label in range(17):
        (tmp_path / "val" / f"n{label:02d}").mkdir(parents=True)
    for row, label in enumerate(LABELS):
        (tmp_path / "val" / f"n{label:02d}" / f"{row}.png").write_bytes(picture(label))
    return ClassFolders(str(tmp_path / "val"), classes=17)


@pytest.fixture
def shards(tmp_path: Path) -> ClassShards:
    """The same images in CLIP_benchmark's layout."""
    (tmp_path / "wds" / "test").mkdir(parents=True)
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as archive:
        for row, label in enumerate(LABELS):
            for suffix, content in (("png", picture(label)), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1")
    names = [f"n{label:02d}" for label in range(17)]
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "wds" / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    return ClassShards(str(tmp_path / "wds" / "test"))


def evaluator(data: Any, **options: Any) -> ZeroShotEvaluator:
    settings = {"name": "z", "class_names": "data", "templates": PLAIN, **options}
    return ZeroShotEvaluator(data=data, **settings)


def test_perfect_worst_and_half_right(folders: ClassFolders, load: Load) -> None:
    """Class 0 taken for class 1: 3 of 6 images wrong, 1 of 3 classes."""
    perfect = evaluator(folders)(load(whole=True))
    assert set(perfect.metrics.values()) == {1.0}
    table = torch.eye(17)
    table[0], table[16] = torch.eye(17)[16], torch.eye(17)[0]
    measured = evaluator(folders)(load(whole=True, table=table))
    assert measured.metrics["top1"] == pytest.approx(3 / 6)
    assert measured.metrics["mean_top1"] == pytest.approx(2 / 3)
    confused = {"is": "n00", "taken for": "n16", "samples": 3}
    assert measured.details["most_confused"] == [confused]
    assert measured.data["counts"] == {"images": 6, "classes": 3}
    json.dumps([dict(measured.protocol), dict(measured.details)])


def test_shards_give_the_same_numbers_and_bring_their_templates(
    folders: ClassFolders, shards: ClassShards, load: Load
) -> None:
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(0))
    there = evaluator(shards, templates="data")(load(whole=True, table=table))
    here = evaluator(folders, templates=["a photo of {}"])(load(whole=True, table=table))
    assert here.metrics == there.metrics
    assert here.protocol["templates_hash"] == there.protocol["templates_hash"]
    with pytest.raises(ValueError, match="bring no templates; set templates=imagenet"):
        evaluator(folders, templates="data")(load(whole=True))


@pytest.mark.parametrize("option", ["class_names", "templates"])
def test_a_result_of_other_texts_is_not_kept(
    folders: ClassFolders, load: Load, tmp_path: Path, option: str
) -> None:
    """All lists of one's own had one protocol before the data were read."""
    texts = [f"n{label:02d} {{}}" for label in range(17)]
    loaded, folder = load(whole=True), tmp_path / "e"
    for again in (True, False):
        same = {"z": evaluator(folders, **{option: texts})}
        run_all(same, loaded, folder=folder, again=again)
    other = {"z": evaluator(folders, **{option: texts[::-1]})}
    with pytest.raises(ValueError, match=r"differs in (class_list|templates)_hash; again=true"):
        run_all(other, loaded, folder=folder, again=False)


def test_imagenet_has_its_names_and_templates(folders: ClassFolders, load: Load) -> None:
    """ViLD's "This is" would spoil the templates."""
    with pytest.raises(ValueError, match="1000 class names for 17 classes of the data"):
        evaluator(folders, class_names="imagenet")(load(whole=True))
    said = said_to(loaded := load(whole=True))
    evaluator(folders, templates="imagenet")(loaded)
    assert len(said) == 80 * 17
    assert said[0] == "a bad photo of a n00."
    assert all(text.count("n00") == 1 for text in said[:80])


@pytest.mark.parametrize("option", ["class_names", "templates"])
def test_a_text_that_is_not_a_list_is_refused(
    folders: ClassFolders, load: Load, option: str
) -> None:
    """As class names it was a bare KeyError, as templates a list of its letters."""
    with pytest.raises(ValueError, match=f"z: {option}=Data, expected imagenet, data or a list"):
        evaluator(folders, **{option: "Data"})(load(whole=True))


def test_class_files_that_do_not_fit_are_named(
    folders: ClassFolders, shards: ClassShards, load: Load
) -> None:
    with pytest.raises(ValueError, match="has 17 folders, there must be 1000 classes"):
        ClassFolders(folders.folder, classes=1000).prepare()
    with pytest.raises(FileNotFoundError, match="no folder per class"):
        ClassFolders(f"{folders.folder}/n00").prepare()
    names = Path(shards.folder).parent / "classnames.txt"
    names.write_text("n00\nn01\n")
    with pytest.raises(ValueError, match=r"0.tar:s0000004: class '2', expected a number from 0"):
        evaluator(shards)(load(whole=True))
    names.unlink()
    with pytest.raises(FileNotFoundError, match=r"classnames\.txt; it belongs next to"):
        shards.prepare()


def test_hidden_folders_and_files_are_left_out_and_counted(
    folders: ClassFolders, load: Load
) -> None:
    """Labels are ranks of the sorted names: one more folder would shift every class."""
    root = Path(folders.folder)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (root / name).mkdir()
        (root / name / "0.png").write_bytes(picture(3))
    for name in ("._0.png", "Thumbs.db", ".DS_Store"):
        (root / "n00" / name).write_bytes(b"x")
    (root / "readme.txt").touch()
    measured = evaluator(folders)(load(whole=True))
    assert measured.metrics["top1"] == 1.0
    skipped = {"file that is not an image": 3, "hidden folder": 2}
    assert measured.data["counts"] == {"images": 6, "classes": 3, "skipped": skipped}


def test_a_subset_is_the_same_every_time(folders: ClassFolders, load: Load) -> None:
    part = ClassFolders(folders.folder, limit=3, limit_seed=4)
    first, again = (evaluator(part)(load(whole=True)) for _ in range(2))
    assert first == again
    assert first.data["counts"]["images"] == 3


@pytest.fixture
def choices(tmp_path: Path) -> CaptionChoices:
    """Two kinds; one image occurs three times."""
    (tmp_path / "images").mkdir()
    for label in (3, 5):
        (tmp_path / "images" / f"{label}.png").write_bytes(picture(label))
    swap = {
        "0": {"filename": "3.png", "caption": "thing 3", "negative_caption": "thing 5"},
        "1": {"filename": "5.png", "caption": "thing 5", "negative_caption": "thing 3"},
        "2": {"filename": "3.png", "caption": "thing 3", "negative_caption": "thing 4"},
    }
    add = {"0": {"filename": "3.png", "caption": "thing 3", "negative_caption": "thing 3"}}
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "swap_att.json").write_text(json.dumps(swap))
    (tmp_path / "kinds" / "add_obj.json").write_text(json.dumps(add))
    return CaptionChoices(str(tmp_path / "kinds"), str(tmp_path / "images"))


def test_choices_are_counted_by_kind(choices: CaptionChoices, load: Load) -> None:
    """Equal captions tie, and a tie is no right answer."""
    measured = ChoiceEvaluator("c", choices)(load(whole=True))
    assert measured.metrics == {"mean": 0.5, "add_obj": 0.0, "swap_att": 1.0}
    assert measured.details["asked"] == {"add_obj": 1, "swap_att": 3}
    assert measured.details["share_of_ties"] == 0.25
    assert measured.data["counts"]["images"] == 2
    table: Tensor = torch.eye(17)
    table[3], table[5] = torch.eye(17)[5], torch.eye(17)[3]
    wrong = ChoiceEvaluator("c", choices, batch_size=1)(load(whole=True, table=table))
    assert wrong.metrics["swap_att"] == 0.0
    only = CaptionChoices(choices.folder, choices.images, kinds=["swap_att"])
    assert ChoiceEvaluator("c", only)(load(whole=True)).metrics["mean"] == 1.0


def test_choice_files_that_do_not_fit_are_named(choices: CaptionChoices, load: Load) -> None:
    with pytest.raises(FileNotFoundError, match=r"no swap_obj.json in"):
        CaptionChoices(choices.folder, choices.images, kinds=["swap_obj"]).prepare()
    path = Path(choices.folder) / "add_obj.json"
    path.write_text(json.dumps({"0": {"filename": "3.png", "caption": "a"}}))
    with pytest.raises(ValueError, match=r"add_obj.json: entry 0 has no negative_caption"):
        ChoiceEvaluator("c", choices)(load(whole=True))
    entry = {"filename": "3.png", "caption": None, "negative_caption": "a"}
    path.write_text(json.dumps({"7": entry}))
    with pytest.raises(ValueError, match="entry 7 has no caption that is text"):
        ChoiceEvaluator("c", choices)(load(whole=True))
    path.write_text('{"0": {"file')
    with pytest.raises(ValueError, match="not complete JSON"):
        ChoiceEvaluator("c", choices)(load(whole=True))
    path.unlink()
    (Path(choices.images) / "5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 annotated images .* first 5.png"):
        ChoiceEvaluator("c", choices)(load(whole=True))
