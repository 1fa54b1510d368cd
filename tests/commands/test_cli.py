"""From a command line to a command, to the jobs of a sweep, and to errors that help."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import Command, call, jobs, run
from gradeclip_ft.commands.config import ConfigurationError, perform


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], DictConfig]]:
    """What commands were started with: (sys.argv, configuration). With seed=1 they fail."""
    calls: list[tuple[list[str], DictConfig]] = []

    def record(cfg: DictConfig) -> None:
        calls.append((list(sys.argv), cfg))
        if cfg.seed == 1:
            raise ValueError("seed 1 is bad")

    monkeypatch.setattr(Command, "function", lambda self: record)
    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.chdir(tmp_path)
    return calls


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Message of a command line that cannot be understood."""
    assert run(COMMANDS, list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= 4
    return captured.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "there is no command trian; did you mean train?"),
        ("+exp=shapes", "there is no command"),
        ("train optim.lrr=1", "no key optim.lrr; did you mean optim.optimizer.lr?"),
        ("train lr=1", "did you mean optim.optimizer.lr?"),
        ("train data={taggr:auto}", "data.taggr: there is no key data.taggr; did you mean +data."),
        ("train trainer.max_step=1", "did you mean trainer.max_steps?"),
        ("train data.tagger=auto", "write +data.tagger=auto"),
        ("train optimm.optimizer.lr=1", "did you mean optim.optimizer.lr?"),
        ("train +exp=shpaes", "exp=shpaes: there is no shpaes; did you mean shapes"),
        ("train exp=shapes", "write +exp=shapes"),
        ("train objective=globl", "there is no globl; did you mean global_"),
        ("train objectiv=global_only", "did you mean objective?"),
        ("train explainer=grad_cam", "write explainer@objective.explainer=grad_cam"),
        ("train +objective=global_only", "objective is given twice"),
        ("train evaluator=[shapes_regoins]", "did you mean shapes_regions?"),
        ("train seed=1,2", "--multirun"),
        ("train x[=1", "x[=1: not a key=value"),
        ("train name=a:[b", "in the shell write 'name=\"a:[b\"'"),
        ("train --cgf job", "--cgf"),
        ("train --config-dir nowhere", "nowhere is not a folder"),
        ("export alhpa=0.5", "did you mean alpha?"),
        ("doctor +exp=cc3m_vitb61", "did you mean cc3m_vitb16"),
        ("list experimnts", "did you mean experiments"),
        ("list experiments now", "too many positional arguments; expected WHAT"),
        ("data mkae shapes", "did you mean make?"),
        ("compare format=txt", "did you mean text?"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    """Would catch a traceback, a page of text, or a hint that leads nowhere."""
    assert words in fails(capsys, *line.split())


def test_a_command_sees_its_configuration_and_a_command_line_to_repeat_it(
    started: list[tuple[list[str], DictConfig]], tmp_path: Path
) -> None:
    """Would catch a second process that starts without the command, and Hydra's outputs/."""
    line = ["train", "name=a", "seed=3", "+exp=smoke"]
    assert run(COMMANDS, line) == 0
    argv, cfg = started[0]
    assert argv == ["prog", *line]
    # Lightning adds these for its other processes when Hydra runs.
    added = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert run(COMMANDS, [*argv[1:], *added]) == 0
    assert started[1][1] == cfg
    assert list(tmp_path.iterdir()) == []


def test_values_of_the_command_line_win_over_an_experiment(
    started: list[tuple[list[str], DictConfig]],
) -> None:
    """Would catch an experiment that lands below cfg.exp, or that cannot be varied."""
    run(COMMANDS, ["train", "name=a", "trainer.max_steps=7", "+exp=smoke"])
    cfg = started[0][1]
    assert (cfg.trainer.max_steps, cfg.data.batch_size) == (7, 16)
    assert "exp" not in cfg


def test_yaml_of_ones_own_is_found(
    started: list[tuple[list[str], DictConfig]], tmp_path: Path
) -> None:
    """Would catch an installed package whose users cannot write experiments."""
    (tmp_path / "mine" / "exp").mkdir(parents=True)
    (tmp_path / "mine" / "exp" / "own.yaml").write_text("# @package _global_\nseed: 41\n")
    line = ["train", "name=a", "--config-dir", "mine", "+exp=own"]
    assert run(COMMANDS, line) == 0
    argv, cfg = started[0]
    assert cfg.seed == 41
    assert run(COMMANDS, argv[1:]) == 0
    assert started[1][1].seed == 41


def test_the_configuration_is_shown(
    started: list[tuple[list[str], DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a command that runs when only asked about, and a flag without effect."""
    seen = []
    for flags in (["--cfg", "job"], ["--cfg", "job", "--resolve"]):
        assert run(COMMANDS, ["train", *flags, "name=a", "seed=5"]) == 0
        seen.append(capsys.readouterr().out)
        shown = OmegaConf.create(seen[-1])
        assert (shown.name, shown.seed) == ("a", 5)
    assert ["${" in text for text in seen] == [True, False]
    assert not started


def test_help_of_the_program_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a command without a docstring, or missing from the table."""
    assert run(COMMANDS, ["--help"]) == 0
    page = capsys.readouterr().out
    for name in COMMANDS:
        line = next(line for line in page.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split(maxsplit=1)[1]) > 10


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_page(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Would catch a help that shows less than what can be set."""
    assert run(COMMANDS, [name, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: python -m gradeclip_ft {name}")
    if COMMANDS[name].config == "train":
        for word in ("shapes_tiny", "global_only", "+exp", "resume: null", "--multirun"):
            assert word in page


def test_an_error_raised_on_purpose_is_a_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Would catch a traceback above "an existing run", or a bare message for a defect."""
    from gradeclip_ft.commands.runs import run_dir

    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for work, message in (
        (lambda: run_dir("a/b"), "name='a/b' is not a valid run name"),
        (below.mkdir, f"{below}: Not a directory"),
    ):
        assert perform(work, full=False) == 1
        meant = capsys.readouterr().err
        assert meant.startswith(f"error: {message}")
        assert "Traceback" not in meant
        assert perform(work, full=True) == 1
        assert "Traceback" in capsys.readouterr().err
    for defect in (lambda: int("x"), lambda: [][0]):
        assert perform(defect, full=False) == 1
        assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_and_a_reader_that_leaves_end_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a traceback for `train` and Ctrl-C, or another code than a shell expects."""

    def interrupt(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "function", lambda self: interrupt)
    assert run(COMMANDS, ["train"]) == 130
    assert capsys.readouterr().err == ""
    line = f"{sys.executable} -m gradeclip_ft list experiments | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_number_that_a_command_returns_is_the_exit_code() -> None:
    """Would catch `doctor` and `data verify` that find problems and exit with 0."""
    assert perform(lambda: 1, full=False) == 1
    assert perform(lambda: None, full=False) == 0


def test_each_job_has_its_own_values_and_command_line(
    started: list[tuple[list[str], DictConfig]], tmp_path: Path
) -> None:
    """Would catch a child process that repeats the whole sweep (it would see -m)."""
    assert run(COMMANDS, ["train", "-m", "+exp=smoke", "seed=2,3"]) == 0
    assert [(cfg.name, cfg.seed) for _, cfg in started] == [("smoke_2", 2), ("smoke_3", 3)]
    for argv, cfg in list(started):
        assert "-m" not in argv
        assert run(COMMANDS, argv[1:]) == 0
        assert started[-1][1] == cfg
    assert sys.argv[0] == "prog"
    assert not (tmp_path / "multirun").exists()


def test_a_failed_job_does_not_stop_the_others(
    started: list[tuple[list[str], DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a night's sweep that ends with its second job, or an exit code of 0."""
    assert run(COMMANDS, ["train", "-m", "seed=0,1,2", "name=a_${seed}"]) == 1
    assert [cfg.seed for _, cfg in started] == [0, 1, 2]
    assert "seed 1 is bad" in capsys.readouterr().err


def test_lists_ranges_and_globs_are_expanded() -> None:
    """Would catch jobs that Hydra runs and the check never saw."""
    line = ["seed=range(0,3)", "trainer=cpu,gpu", "name=a"]
    assert len(jobs("train", line)) == 6
    rows = jobs("train", ["+exp/maps=glob(*)", "seed=0"])
    assert [job[0] for job in rows][-1] == "+exp/maps=uniform"
    assert all(job[1] == "seed=0" for job in rows)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed=0,1 name=a", "2 jobs of the sweep are called a"),
        ("name=a,b objective=global_only,globl", "there is no globl"),
        ("name=a,b +optim.typo=1", "takes no typo"),
        ("name=a,b trainer=ddp_sim", "trainer.devices=2"),
        ("name=a,b trainer.num_nodes=2", "trainer.num_nodes=2"),
        ("name=a,b trainer.devices=-1", "start the jobs one by one"),
        ("name=a,b trainer=ddp hydra/launcher=joblib", "hydra/launcher=joblib"),
    ],
)
def test_a_sweep_that_cannot_work_does_not_begin(
    started: list[tuple[list[str], DictConfig]],
    capsys: pytest.CaptureFixture[str],
    line: str,
    words: str,
) -> None:
    """Would catch a mistake in the last job that shows after hours, or children of a sweep."""
    assert run(COMMANDS, ["train", "-m", *line.split()]) == 2
    assert words in capsys.readouterr().err
    assert not started


def example(
    action: Literal["make", "count"],
    *words: str,
    out: Path,
    size: int = 64,
    share: float = 0.5,
    again: bool = False,
    limit: int | None = None,
    kind: Literal["a", "b"] = "a",
    names: tuple[str, ...] = (),
) -> tuple[Any, ...]:
    """All kinds of arguments."""
    return action, words, out, size, share, again, limit, kind, names


def test_arguments_of_a_plain_command_are_read_as_annotated() -> None:
    """Would catch the string "false" that counts as true, or a path with = taken for an option."""
    line = "make shapes out=a/b=c size=32 share=1 again=true limit=3 names=[x,y=z,*/w] kind=b"
    assert call(example, line.split()) == (
        "make", ("shapes",), Path("a/b=c"), 32, 1.0, True, 3, "b", ("x", "y=z", "*/w"),
    )  # fmt: skip
    found = call(example, ["count", "runs/lr=1e-5", "out=x", "limit=null", "names=q,r"])
    assert (found[1], found[6], found[8]) == (("runs/lr=1e-5",), None, ("q", "r"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("out=x", "'action'; expected make|count [WORDS ...] out=... [size=64]"),
        ("mkae out=x", "action: there is no mkae; did you mean make?"),
        ("make", "'out'; expected make|count"),
        ("make out=x sise=3", "sise=3: no such option; did you mean size"),
        ("make out=x size=big", "size: got 'big', expected int"),
        ("make out=x again=maybe", "again: got 'maybe', expected bool"),
        ("make out=x limit=few", "limit: got 'few', expected int"),
        ("make out=x kind=c", "kind: there is no c; choose from a, b"),
    ],
)
def test_what_a_plain_command_cannot_read_is_named(line: str, words: str) -> None:
    """Would catch a TypeError of Python for a misspelt option."""
    with pytest.raises(ConfigurationError) as caught:
        call(example, line.split())
    assert words in str(caught.value)
