"""`data` on the command line: every action, and what a wrong one is told."""

import json
from pathlib import Path

import pytest

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
