"""`list` reads conf/ and nothing else."""

from pathlib import Path

import pytest

from gradeclip_ft.commands.list import list_options, summary

CONF = Path(__file__).parents[2] / "conf"


def test_every_list_holds_every_file_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a yaml that nobody finds, or one without a word about what it is."""
    list_options()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    groups = {"experiments": "exp", "explainers": "explainer", "models": "model", "data": "data"}
    assert set(groups) <= set(listed)
    for what, group in groups.items():
        list_options(what)
        lines = capsys.readouterr().out.splitlines()
        entries = {line.split()[0]: line for line in lines if not line.startswith(" ")}
        assert sorted(entries) == sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        assert all(len(line.split()) > 3 for line in entries.values())


def test_a_comment_is_one_paragraph_and_its_command_a_line(tmp_path: Path) -> None:
    """Would catch Hydra's header in the list, or a page of reasons for one experiment."""
    path = tmp_path / "x.yaml"
    path.write_text("# @package _global_\n# python -m x\n# To expect:\n# 5.\n#\n# Why.\na: 1\n")
    assert summary(path) == "python -m x\nTo expect: 5."
    path.write_text("a: 1  # no comment\n# later\n")
    assert summary(path) == ""
