"""`list` reads conf/ and nothing else."""

from pathlib import Path

import pytest

from gradeclip_ft.commands.list import list_options, summary

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("what", "group"),
    [
        ("experiments", "exp"),
        ("explainers", "explainer"),
        ("evaluators", "evaluator"),
        ("models", "model"),
        ("data", "data"),
        ("trainer", "trainer"),
    ],
)
def test_every_file_is_listed_with_its_comment(
    capsys: pytest.CaptureFixture[str], what: str, group: str
) -> None:
    """Would catch a yaml that nobody finds, or one without a word about what it is."""
    list_options(what)
    lines = capsys.readouterr().out.splitlines()
    entries = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert sorted(entries) == sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in entries.values())


def test_the_lists_themselves_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch `list` without a word answering with nothing."""
    list_options()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"experiments", "explainers", "evaluators", "models", "data"} <= set(names)


def test_a_comment_is_one_paragraph_and_its_command_a_line(tmp_path: Path) -> None:
    """Would catch Hydra's header in the list, or a page of reasons for one experiment."""
    path = tmp_path / "x.yaml"
    path.write_text("# @package _global_\n# python -m x\n# To expect:\n# 5.\n#\n# Why.\na: 1\n")
    assert summary(path) == "python -m x\nTo expect: 5."
    path.write_text("a: 1  # no comment\n# later\n")
    assert summary(path) == ""
