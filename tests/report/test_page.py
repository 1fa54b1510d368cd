"""The page as a file: self-contained, escaped, complete."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gradeclip_ft.report.content import Page
from gradeclip_ft.report.page import write_page

VOID = {"meta", "link", "img", "input", "br"}


class Reader(HTMLParser):
    """Collects tags with attributes, and text; checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def html(page: Page, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_page(page, tmp_path_factory.mktemp("page") / "folder" / "report.html")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_file_is_well_formed(html: str) -> None:
    """Catches a macro that leaves a tag open, which browsers hide by guessing."""
    assert Reader(html).open == []


def test_nothing_outside_is_referenced(html: str) -> None:
    """Catches a font or script from elsewhere: the page must work offline, from a mail."""
    references = [
        value
        for _, attributes in Reader(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert references
    assert all(str(value).startswith("data:") for value in references)
    assert not re.search(r"@import|https?://|url\((?!'data:)", html)


def test_all_text_is_escaped(html: str) -> None:
    """Catches a caption that runs as a script: the hostile text is text wherever it stands."""
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert") >= 8
    assert sum(tag == "script" for tag, _ in Reader(html).tags) == 2


def test_the_table_shows_per_cent_with_signed_differences(html: str) -> None:
    """By hand: 12.5 is 2.5 above 10.0; 57.96 is 0.04 below 58, which rounds to no difference."""
    text = Reader(html).text
    assert "Boxes 64 classes 10.0 12.5 +2.5 67.2 +57.2 +54.7" in text
    assert "Texts, R@1 60.0 58.0 −2.0 58.0 −2.0 ±0.0" in text
    assert "Stuff 20.0 – – –" in text


def test_every_phrase_has_a_map_of_every_method(page: Page, html: str) -> None:
    cells = [a for _, a in Reader(html).tags if str(a.get("class", "")).startswith("cell")]
    assert len(cells) == sum(len(case.phrases) * len(page.methods) for case in page.cases)
    maps = [a for _, a in Reader(html).tags if a.get("class") == "heat"]
    assert len(maps) == len(cells)
    assert maps[0]["data-grid"] == "4 4"
    hot = [str(a["data-values"]).split().index("100") for a in maps[:9]]
    assert hot == [0, 4, 8, 1, 5, 9, 2, 6, 10]  # case 0: phrase by phrase, method m in row m


def test_a_chart_without_values_is_left_out(html: str) -> None:
    assert "Global loss (nats)" in html
    assert "Nothing was logged" not in html


def test_a_page_without_cases_or_tables_is_still_a_page(tmp_path: Path) -> None:
    path = write_page(Page("Only words", "Nothing else.", ("a",)), tmp_path / "report.html")
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.open == []
    assert "Nothing else." in reader.text


def test_an_empty_map_is_named_so(page: Page, tmp_path: Path) -> None:
    """Catches an all-zero map that looks like one with little contrast."""
    case = page.cases[0]
    heat = {**case.heat, "Ordinary": np.zeros((3, 4, 4), dtype=np.float32)}
    path = write_page(replace(page, cases=[replace(case, heat=heat)]), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").count("no relevance anywhere") == 3
