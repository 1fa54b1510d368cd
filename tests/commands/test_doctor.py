"""doctor says whether a run could start, and finds what would stop it."""

import shutil
from pathlib import Path

import pytest

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import doctor as module
from gradeclip_ft.commands import runs
from gradeclip_ft.commands.cli import run
from gradeclip_ft.commands.config import compose
from gradeclip_ft.data.shapes import make_shapes


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory: no data, no runs."""
    monkeypatch.chdir(tmp_path)


def report(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, dict[str, str]]:
    """Exit code, and the lines of each check."""
    code = module.doctor(compose("train", ["name=a", "+exp=smoke", *overrides]))
    lines: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines()[:-1]:
        name = line[9:26].strip()
        lines[name] = lines.get(name, "") + line + "\n"
    return code, lines


def test_the_default_could_start_anywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Would catch a doctor that makes data or claims the run's folder, or finds faults in both."""
    code, lines = report(capsys)
    assert code == 0
    assert "textblob" in lines["tagger"]
    assert "is made when training starts" in lines["training data"]
    assert "torch" in lines["packages"]
    assert "shapes_tiny" in lines["model"]
    assert list(tmp_path.iterdir()) == []


def test_shards_that_are_there_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Would catch shards that exist and cannot be read, or captions that give no phrase."""
    make_shapes("data/shapes_smoke", train=256, val=32, seed=0, workers=1)
    code, lines = report(capsys)
    assert code == 0
    assert "16 steps of 16 an epoch" in lines["training data"]
    assert " phrases" in lines["training data"]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tar").write_bytes(b"no tar")
    code, lines = report(capsys, "data.shards=broken", "data.make=null")
    assert code == 1
    assert "no sample that can be read" in lines["training data"]


@pytest.mark.parametrize(
    ("override", "check", "words"),
    [
        ("data.make=null data.shards='a-{0..3}.tar'", "training data", "4 of 4 shards do not"),
        ("evaluator=coco_regions_224", "evaluation data", "panoptic_val2017.json"),
        ("trainer.accelerator=gpu trainer.devices=99", "trainer", "99 GPUs wanted"),
        ("model.image_size=65", "model", "65 is not a multiple of the patch size 8"),
        ("model.name=shapes_tinny", "model", "did you mean shapes_tiny"),
        ("model.weights=none.safetensors", "model", "file none.safetensors does not exist"),
        (
            "model=open_clip model.name=ViT-B-32 model.weights=openai data.make=null",
            "model",
            "give name=ViT-B-32-quickgelu",
        ),
        ("model=classifier model.name=timm:vit_tiny_patch16_224", "model", "is a classifier,"),
        ("init_from=nothing", "model", "neither a weights file nor a run"),
        ("name=a/b", "run folder", "not a valid run name"),
        ("evaluation.best=shapes_regoins/boxes/top1", "evaluation data", "mean shapes_regions?"),
        ("evaluation.best=shapes_regions", "evaluation data", "write shapes_regions/METRIC"),
        ("evaluation.alphas=[1.5]", "evaluation data", "alpha=1.5 is outside of 0 to 1"),
        (
            "evaluator.shapes_retrieval.name=shapes_regions",
            "evaluation data",
            "evaluators need different names",
        ),
        ("trainer.precision=16-mixed", "trainer", "16-mixed needs a GPU"),
        ("trainer.stop_at=0", "trainer", "training needs 1 step"),
        ("optim.schedule.warmup=4", "trainer", "the warm-up takes 4 of 4 steps"),
        ("optim.image_blocks=9", "model", "image_blocks is 9 of"),
        ("data.shards=elsewhere/train", "training data", "is not in data/shapes_smoke"),
    ],
)
def test_what_would_stop_the_run_is_found(
    capsys: pytest.CaptureFixture[str], override: str, check: str, words: str
) -> None:
    """Would catch a doctor that is content with a run that dies in its first minute."""
    code, lines = report(capsys, *override.split())
    assert code == 1
    assert words in lines[check]
    assert "problem" in lines[check]
    assert "ok" in lines["packages"]


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.best=shapes_regoins/boxes/top1",
        "evaluation.alphas=[1.5]",
        "evaluator.shapes_retrieval.name=shapes_regions",
        "init_from=nothing",
        "model=classifier",
        "optim.schedule.warmup=4",
        "trainer.accelerator=gpu",
        "trainer.precision=16-mixed",
        "trainer.keep=0",
    ],
)
def test_train_refuses_the_same_before_it_builds_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    """Would catch a check of `doctor` that `train` makes after minutes, or not at all."""
    _, lines = report(capsys, override)
    monkeypatch.setattr("gradeclip_ft.models.load.load_clip", lambda *args, **options: 1 / 0)
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    assert run(COMMANDS, ["train", "+exp=smoke", override]) in (1, 2)
    told = capsys.readouterr().err.removeprefix("error: ").splitlines()[0]
    assert told
    assert any(told in line for line in lines.values()), told


def test_train_and_doctor_ask_for_room_for_every_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three checkpoints and two files of weights are on the disk while the last one is written."""
    weights, checkpoint = 2_462_220, 7_454_383  # of a run; the names and checksums are 1 % of it
    needed = 3 * checkpoint + 2 * weights
    for free, fits in ((1.05 * needed, True), (0.95 * needed, False)):
        usage = shutil._ntuple_diskusage(10**12, 10**12, int(free))  # type: ignore[attr-defined]
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        _, lines = report(capsys)
        assert ("no room on the disk" not in lines["model"]) == fits
        assert "2 checkpoints of 7.4 MB and weights of 2.5 MB in runs/a" in lines["model"]
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    assert run(COMMANDS, ["train", "+exp=smoke"]) == 1
    assert "no room on the disk: 2 checkpoints" in capsys.readouterr().err


def test_a_table_that_cannot_be_read_is_said_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing that follows from it is a problem of its own."""
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    words = ("data=photos", "data.table=t.csv", "data.images=.", "model=shapes_tiny")
    code = module.doctor(compose("train", ["name=a", *words]))
    shown = capsys.readouterr().out
    assert code == 1
    assert shown.splitlines()[-1] == "1 problem"
    assert shown.count("t.csv begins with") == 1


def test_a_folder_that_cannot_be_written_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    _, lines = report(capsys)
    assert "is not writable; choose another runs_dir=" in lines["run folder"]


def test_a_run_of_this_name_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a doctor that forgets what `train` refuses first."""
    cfg = compose("train", ["name=a", "+exp=smoke"])
    runs.claim(runs.run_dir("a"), cfg)
    code, lines = report(capsys)
    assert code == 1
    assert "resume=auto" in lines["run folder"]
    code, lines = report(capsys, "resume=auto")
    assert code == 0
    assert "continues" in lines["run folder"]


def test_one_fault_is_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and its evaluator read one table; without a GPU, trainer=gpu is no remedy."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = ["data=photos", "model=shapes_tiny", "data.table=t.csv", "trainer=gpu", "name=a"]
    assert module.doctor(compose("train", [*words, "trainer.max_steps=20"])) == 1
    told = capsys.readouterr().out
    assert told.count("no table t.csv") == 1
    assert "1 GPUs wanted, 0 found; choose trainer=cpu\n" in told
    assert told.splitlines()[-1] == "2 problems"
