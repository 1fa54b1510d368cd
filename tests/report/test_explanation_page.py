"""A page of many methods with coloured words: what `explain` writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gradeclip_ft.report.content import Case, Page, Words
from gradeclip_ft.report.page import write_page
from tests.report.browsing import in_frame, open_page, shown, told, with_script

METHODS = [f"method_{letter}" for letter in "abcdefghijklmn"]
SENTENCE = Words(
    ["a", "<i>red</i>", "dog"], {"one": [0.25, 0.0, 0.75], "two": [0.0, 0.0, 0.0]}, "$5 & more"
)


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    return Case(
        image=np.full((48, 64, 3), 90, dtype=np.uint8),
        phrases=("dog", "grass"),
        heat={method: rng.random((2, 4, 4)).astype(np.float32) for method in METHODS},
        source="<b>.jpg",
        scores=["cosine 0.312", "cosine −0.020"],
        sentences=[SENTENCE],
    )


@pytest.fixture(scope="module")
def page(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Page("Maps", "Intro", METHODS, first="method_b", cases=[case])
    return write_page(made, tmp_path_factory.mktemp("page") / "index.html")


def test_words_carry_their_share_and_the_largest_the_deepest_colour(page: Path) -> None:
    text = page.read_text()
    words = re.findall(r'--share: ([\d.]+)" title="([^"]*)">([^<]*)<small>(\d+)', text)
    assert [word[:1] + word[2:] for word in words[:3]] == [
        ("0.333", "a", "25"),
        ("0.000", "&lt;i&gt;red&lt;/i&gt;", "0"),
        ("1.000", "dog", "75"),
    ]
    assert words[2][1] == "dog: 0.750 of the relevance by one"
    assert "no relevance anywhere" in text
    assert "“$5 &amp; more”" in text
    assert text.count("cosine 0.312") == 1  # once for all methods


@pytest.mark.browser
def test_the_page_opens_on_the_first_method_and_keys_reach_all(
    browser: str, page: Path, tmp_path: Path
) -> None:
    assert shown(open_page(browser, page, "", tmp_path / "a"))[0] == "method_b: dog"
    said = "root.querySelector('.shown .stage .now').textContent"
    action = f"press('m'); press('2'); tell({said})"
    acted = with_script(page, tmp_path, action)
    assert told(open_page(browser, acted, "", tmp_path / "b")) == "method_c: grass"


@pytest.mark.browser
def test_many_methods_fit_a_screen_and_a_phone(browser: str, page: Path, tmp_path: Path) -> None:
    """No sideways scrolling at 1280 or 390 pixels, and every name can be read."""
    action = (
        "const side = root.querySelector('.shown .grid-side');"
        "const names = [...root.querySelectorAll('.shown .cell .name')];"
        "parent.postMessage([document.documentElement.scrollWidth - innerWidth,"
        "side.scrollWidth - side.clientWidth,"
        "names.filter((name) => name.offsetHeight > 0).length].join(' '), '*')"
    )
    acted = with_script(page, tmp_path, action)
    for width in (1280, 390):
        frame = in_frame(acted, width)
        assert told(open_page(browser, frame, "", tmp_path / str(width))) == "0 0 28"
