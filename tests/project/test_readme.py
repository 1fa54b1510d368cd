"""Every command that the documentation shows can be typed as it stands."""

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import data
from gradeclip_ft.commands.cli import call, jobs
from gradeclip_ft.commands.config import check, compose
from tools.notebook import notebook

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("results/*.md"))]
PAGES = [page for page in PAGES if page.name != "plugins.md"]  # tests/commands/test_plugins.py
PROGRAM = ["python", "-m", "gradeclip_ft"]


def commands(page: Path) -> Iterator[str]:
    """Command lines of a page's code blocks; a backslash continues a line."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.strip().removeprefix("$ ")
            if text.startswith(("python ", "make ")):
                yield text


SHOWN = [
    pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in commands(page)
]


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_of_the_documentation_is_understood(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a renamed option, experiment or command that the README still shows."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[:3] == PROGRAM:
        understood(words[3], words[4:], monkeypatch)
    elif words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    else:
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()


def understood(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose and check, or bind to the function; nothing is executed."""
    command = COMMANDS[name]
    if command.config is not None:
        overrides = [word for word in arguments if word not in ("-m", "--multirun")]
        for job in jobs(command.config, command.overrides(overrides)):
            check(compose(command.config, job), command.config)
        return
    for action, function in list(data.ACTIONS.items()):
        monkeypatch.setitem(data.ACTIONS, action, bound_only(function, 0))
    function = command.function()
    call(function if name == "data" else bound_only(function, None), arguments)


def bound_only(function, result):  # type: ignore[no-untyped-def]
    """A function with the same arguments that does nothing."""

    @functools.wraps(function)
    def nothing(*args: object, **kwargs: object) -> object:
        return result

    return nothing


def test_the_readme_shows_the_main_commands() -> None:
    """Would catch a block that is no longer found, so that nothing is tested."""
    shown = " ".join(commands(ROOT / "README.md"))
    for words in ("make demo", "make test", "train +exp=", "doctor", "evaluate", "export"):
        assert words in shown


def python_of(page: str, folder: Path) -> dict[str, Any]:
    """What the one block of Python of a page leaves; with the packaged model for the large one."""
    from PIL import Image

    for name in ("dog.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (90, 60), "red").save(folder / name)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    large = 'load("ViT-B-16-quickgelu", "openai")'
    assert large in block
    exec(block.replace(large, 'load("shapes_tiny")'), names)
    return names


def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = python_of("README.md", tmp_path)
    assert names["match"].shape == (1, 2)
    assert names["found"][0].heat["grad_eclip"].shape == (2, 8, 8)
    assert names["found"][0].on_photo("game").shape == (2, 60, 90)
    assert (tmp_path / "dog.html").is_file()


def test_the_python_on_maps_and_words_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = python_of("docs/explain.md", tmp_path)
    assert names["words"][0].words == ["a", "dog", "on", "the", "grass"]
    assert len(names["words"][0].values["grad_eclip"]) == 5


def test_the_page_on_python_runs_and_is_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of docs/api.md, and outputs that are small and of these very cells."""
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    made = notebook((ROOT / "docs" / "api.md").read_text())["cells"]
    text = (ROOT / "docs" / "explain.ipynb").read_text()
    kept = json.loads(text)["cells"]
    assert [(c["cell_type"], c["source"]) for c in kept] == [
        (c["cell_type"], c["source"]) for c in made
    ], "run python -m tools.notebook"
    assert sum("image/png" in str(c.get("outputs")) for c in kept) == 3
    assert len(text) < 400_000
    assert (tmp_path / "scene.html").is_file()


def test_the_readme_is_not_long() -> None:
    """Would catch a README that nobody reads to the end."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
