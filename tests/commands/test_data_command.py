"""`data` on the command line: every action, and what a wrong one is told."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import cli
from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import ConfigurationError
from gradeclip_ft.commands.data import ACTIONS, data
from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer


def run(*arguments: object) -> int:
    code = call(data, [str(argument) for argument in arguments])
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shapes world, made by the command."""
    folder = tmp_path_factory.mktemp("world") / "shapes"
    assert run("make", "shapes", f"out={folder}", "train=40", "val=4", "workers=1") == 0
    return folder


def test_help_names_every_action_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(COMMANDS, ["data", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\ndata {action} " in shown for action in ACTIONS)
    assert "data phrases [SHARDS ...] out=... [tagger=auto|nltk|textblob] [max_phrases=20]" in shown


def test_shapes_are_made_counted_and_verified(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = world.parent / "sizes.json"
    assert run("count", world / "train", f"out={sizes}") == 0
    assert "40  samples in 8 shards" in capsys.readouterr().out
    assert sum(entry["samples"] for entry in json.loads(sizes.read_text()).values()) == 40
    assert run("verify", f"shards={world / 'train'}", "workers=1") == 0
    assert "40 of 40 samples usable in 8 shards" in capsys.readouterr().out


def test_verify_finds_a_truncated_shard(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = sorted((world / "train").iterdir())[:2]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(bad.read_bytes()[:7000])
    assert run("verify", good, broken, "workers=1") == 1
    printed = capsys.readouterr().out
    assert "1  truncated_shard, first" in printed
    assert f"{broken}: " in printed


def test_coco_files_become_shards_that_train(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = world / "annotations/captions_val.json"
    out = tmp_path / "coco"
    assert run("coco", f"captions={captions}", f"images={world / 'images_val'}", f"out={out}") == 0
    assert "4  samples in 4 shards" in capsys.readouterr().out
    assert run("phrases", out, f"out={out}", "tagger=textblob", "workers=2") == 0
    assert "phrases per caption; without a phrase: " in capsys.readouterr().out
    loader = CaptionTrainData(
        shards=str(out),
        batch_size=4,
        workers=0,
        resampled=False,
        caption="any",
        tagger="textblob",
        tokenizer=Tokenizer(WordTokenizer(("a", "circle"), 16), 16),
        transform=ImageTransform((32, 32), Preprocessing(), train=True),
    ).loader(seed=0, epoch=0, rank=0, world_size=1)
    (batch,) = loader
    assert len(batch.phrase) >= 4
    assert batch.skipped == {}


def test_a_folder_and_a_table_become_shards(world: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (world / "images_val").iterdir())
    table = tmp_path / "t.csv"
    table.write_text("filename,caption\n" + "".join(f"{name},a scene\n" for name in names))
    out = tmp_path / "out"
    options = [f"table={table}", f"images={world / 'images_val'}", f"out={out}", "name=mine"]
    assert run("folder", *options) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == [
        f"mine-{n:04d}.tar" for n in range(4)
    ]
    assert run("split", out, f"out={tmp_path / 'more'}", "shard_size=1") == 0
    assert len(list((tmp_path / "more").glob("*.tar"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cuont"], "did you mean count"),
        (["count"], "SHARDS are missing"),
        ([], "choose from make"),
        (["make"], "'world'; expected shapes"),
        (["make", "shaeps"], "did you mean shapes"),
        (["count", "a.tar", "seed=1"], "seed=1: no such option"),
        (["coco", "a.json"], "too many positional arguments; expected captions="),
        (["verify", "a.tar", "wrokers=2"], "did you mean workers"),
        (["split", "a.tar", "out=b", "shard_size=big"], "expected int"),
    ],
)
def test_wrong_command_lines_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace(".", r"\.")):
        run(*arguments)


NAMES = ("000000000285.jpg", "000000000632.jpg")


def check(*arguments: object) -> int:
    return run("check", *arguments)


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
    assert check(*instances(coco), "read=true") == 0
    shown = capsys.readouterr().out
    assert "coco_instances_224: 2 images, 2 things, 0 stuff" in shown
    assert "classes without a sample: 1 of 2: dog" in shown
    assert "not readable: 0 of 2" in shown
    assert check(*captions(coco)) == 0
    assert "images by number of captions: 1 x 2, 1 x 5" in capsys.readouterr().out


def test_a_missing_image_a_broken_one_and_a_cut_file_fail(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "val2017" / NAMES[1]).write_bytes(b"no picture")
    assert check(*instances(coco)) == 0  # it is there; only reading tells
    assert check(*instances(coco), "read=true") == 1
    assert "not readable: 1 of 2" in capsys.readouterr().out
    (coco / "val2017" / NAMES[1]).unlink()
    assert check(*captions(coco)) == 1
    assert "1 of 2 annotated images are not in" in capsys.readouterr().out
    (coco / "captions.json").write_text('{"images": [')
    assert check(*captions(coco)) == 1
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
    assert check(*captions(coco), f"against={coco / 'dataset_coco.json'}") == 1
    assert f"in the training data too: 1 of 2: {NAMES[0]}" in capsys.readouterr().out
    source = [f"captions={coco / 'captions.json'}", f"images={coco / 'val2017'}"]
    assert run("coco", *source, f"out={coco / 'shards'}") == 0
    assert check(*captions(coco), f"against={coco / 'shards'}") == 1
    assert "in the training data too: 2 of 2" in capsys.readouterr().out


def test_shards_that_do_not_name_their_photos_are_not_compared(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their keys are running numbers, which equal many names of files."""
    with tarfile.open(coco / "a.tar", "w") as shard:
        shard.add(coco / "val2017" / NAMES[0], f"./{NAMES[0]}")
    with pytest.raises(ValueError, match="no sample says which photo it is"):
        check(*captions(coco), f"against={coco / 'a.tar'}")


def test_images_that_other_programs_show_differently_are_counted(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(coco / "val2017" / NAMES[0], exif=exif)
    assert check(*instances(coco), "read=true") == 0
    assert "turned by EXIF: 1 (other programs" in capsys.readouterr().out


def test_an_evaluator_without_data_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("timing") == 0
    assert "timing: it reads no data" in capsys.readouterr().out


def test_other_training_data_do_not_overlap(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (coco / "t.json").write_text(json.dumps({"images": [{"file_name": "000000000999.jpg"}]}))
    assert check(*captions(coco), f"against={coco / 't.json'}") == 0
    assert "in the training data too: 0 of 2\n" in capsys.readouterr().out


def test_wrong_words_are_named(coco: Path) -> None:
    with pytest.raises(ConfigurationError, match="the name of an evaluator is missing"):
        check()
    with pytest.raises(ConfigurationError, match="coco_retrieval has no segments=; its data take"):
        check(*captions(coco), "segments=x")
    with pytest.raises(ConfigurationError, match="coco_retrival"):
        check("coco_retrival")
