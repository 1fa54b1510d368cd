"""`data check`: what it counts, what it finds wrong, and its exit code."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import ConfigurationError
from gradeclip_ft.commands.data import data

NAMES = ("000000000285.jpg", "000000000632.jpg")


def run(*arguments: object) -> int:
    code = call(data, ["check", *map(str, arguments)])
    assert isinstance(code, int)
    return code


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images with a cat and seven captions, in COCO's files; a dog never occurs."""
    (tmp_path / "val2017").mkdir()
    for name in NAMES:
        Image.fromarray(np.full((30, 40, 3), 9, np.uint8)).save(tmp_path / "val2017" / name)
    images = [
        {"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(NAMES)
    ]
    box = {"bbox": [0, 0, 20, 20], "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]], "iscrowd": 0}
    regions = [{"id": n, "image_id": n, "category_id": 3, **box} for n in range(2)]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    content = {"images": images, "annotations": regions, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    captions = [{"image_id": n // 5, "caption": f"text {n}"} for n in range(7)]
    (tmp_path / "captions.json").write_text(json.dumps({**content, "annotations": captions}))
    return tmp_path


def instances(coco: Path) -> list[str]:
    place = f"annotations={coco / 'instances.json'}"
    return ["coco_instances_224", place, f"images={coco / 'val2017'}"]


def captions(coco: Path) -> list[str]:
    return ["coco_retrieval", f"annotations={coco / 'captions.json'}", f"images={coco / 'val2017'}"]


def test_counts_absent_classes_and_captions_are_printed(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*instances(coco), "read=true") == 0
    shown = capsys.readouterr().out
    assert "coco_instances_224: 2 images, 2 things, 0 stuff" in shown
    assert "classes without a sample: 1 of 2: dog" in shown
    assert "not readable: 0 of 2" in shown
    assert run(*captions(coco)) == 0
    assert "images by number of captions: 1 x 2, 1 x 5" in capsys.readouterr().out


def test_a_missing_image_a_broken_one_and_a_cut_file_fail(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "val2017" / NAMES[1]).write_bytes(b"no picture")
    assert run(*instances(coco)) == 0  # it is there; only reading tells
    assert run(*instances(coco), "read=true") == 1
    assert "not readable: 1 of 2" in capsys.readouterr().out
    (coco / "val2017" / NAMES[1]).unlink()
    assert run(*captions(coco)) == 1
    assert "1 of 2 annotated images are not in" in capsys.readouterr().out
    (coco / "captions.json").write_text('{"images": [')
    assert run(*captions(coco)) == 1
    assert "not complete JSON" in capsys.readouterr().out


def test_images_of_the_training_data_are_found(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same photo has another name in COCO 2014, and a number in a shard."""
    training = {
        "images": [
            {"filename": "COCO_val2014_000000000285.jpg", "split": "restval", "sentences": []},
            {"filename": "COCO_val2014_000000000632.jpg", "split": "test", "sentences": []},
        ]
    }
    (coco / "dataset_coco.json").write_text(json.dumps(training))
    assert run(*captions(coco), f"against={coco / 'dataset_coco.json'}") == 1
    assert f"in the training data too: 1 of 2: {NAMES[0]}" in capsys.readouterr().out
    source = [f"captions={coco / 'captions.json'}", f"images={coco / 'val2017'}"]
    assert call(data, ["coco", *source, f"out={coco / 'shards'}"]) == 0
    assert run(*captions(coco), f"against={coco / 'shards'}") == 1
    assert "in the training data too: 2 of 2" in capsys.readouterr().out


def test_shards_that_do_not_name_their_photos_are_not_compared(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their keys are running numbers, which equal many names of files."""
    with tarfile.open(coco / "a.tar", "w") as shard:
        shard.add(coco / "val2017" / NAMES[0], f"./{NAMES[0]}")
    with pytest.raises(ValueError, match="no sample says which photo it is"):
        run(*captions(coco), f"against={coco / 'a.tar'}")


def test_images_that_other_programs_show_differently_are_counted(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(coco / "val2017" / NAMES[0], exif=exif)
    assert run(*instances(coco), "read=true") == 0
    assert "turned by EXIF: 1 (other programs" in capsys.readouterr().out


def test_an_evaluator_without_data_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("timing") == 0
    assert "timing: it reads no data" in capsys.readouterr().out


def test_other_training_data_do_not_overlap(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (coco / "t.json").write_text(json.dumps({"images": [{"file_name": "000000000999.jpg"}]}))
    assert run(*captions(coco), f"against={coco / 't.json'}") == 0
    assert "in the training data too: 0 of 2\n" in capsys.readouterr().out


def test_wrong_words_are_named(coco: Path) -> None:
    with pytest.raises(ConfigurationError, match="the name of an evaluator is missing"):
        run()
    with pytest.raises(ConfigurationError, match="coco_retrieval has no segments=; its data take"):
        run(*captions(coco), "segments=x")
    with pytest.raises(ConfigurationError, match="coco_retrival"):
        run("coco_retrival")
