"""The page in a real browser, without a driver: the part behind # selects what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradeclip_ft.report.content import Page
from gradeclip_ft.report.page import write_page
from tests.report.browsing import in_frame, open_page, shown, told, with_script

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(page, tmp_path_factory.mktemp("browser") / "report.html")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("#case=2&phrase=2&method=2", ("Ordinary: b", 9)),
        ("#case=99&phrase=0&method=oops", ("Untouched: a", 4)),
    ],
)
def test_the_address_chooses_the_map(
    browser: str, report: Path, tmp_path: Path, state: str, expected: tuple[str, int]
) -> None:
    """Catches a page whose large map does not follow the choice, also a nonsensical one."""
    assert shown(open_page(browser, report, state, tmp_path)) == expected


# What the reader does, one after the other, and what then stands on the large map.
ACTIONS = [
    ("", "Grad-ECLIP: red circle @8"),
    ("root.querySelector('.shown .cell[aria-label^=Ordinary]').click()", "Ordinary: red circle @4"),
    ("root.querySelector('input[name=method-1][value=\"1\"]').click()", "Untouched: red circle @0"),
    ("press('3')", "Untouched: blue star @2"),
    ("press('m')", "Ordinary: blue star @6"),
    ("root.querySelector('input[name=case][value=\"2\"]').click()", "Ordinary: a @8"),
    ("root.querySelector('input[name=phrase-2][value=\"2\"]').click()", "Ordinary: b @9"),
    ("press('n')", "Ordinary: red circle @4"),
    ("press('p'); press('2'); press('m')", "Grad-ECLIP: b @13"),
]


def test_clicks_and_keys_change_the_map(browser: str, report: Path, tmp_path: Path) -> None:
    """A script behind the page's own acts as the reader and notes what is shown."""
    note = (
        "; said.push(root.querySelector('.shown .stage .now').textContent + ' @' +"
        "root.querySelector('.shown .stage .heat').dataset.values.split(' ').indexOf('100'));"
    )
    actions = "".join(action + note for action, _ in ACTIONS)
    acted = with_script(report, tmp_path, f"const said = []; {actions} tell(said.join(' | '))")
    dom = open_page(browser, acted, "", tmp_path / "profile")
    assert told(dom).split(" | ") == [expected for _, expected in ACTIONS]


def test_slider_and_switch_reach_every_map(browser: str, report: Path, tmp_path: Path) -> None:
    """Catches maps that keep their opacity, or boxes that cannot be hidden."""
    action = (
        "const slider = root.querySelector('.opacity'); slider.value = 25;"
        "slider.dispatchEvent(new Event('input', { bubbles: true })); press('b');"
        "const style = (name) => getComputedStyle(root.querySelector(`.shown .cell ${name}`));"
        "tell(`${style('.heat').opacity} ${style('.boxes').display}`)"
    )
    acted = with_script(report, tmp_path, action)
    assert told(open_page(browser, acted, "", tmp_path / "profile")) == "0.25 none"


def test_a_phone_needs_no_sideways_scrolling(browser: str, report: Path, tmp_path: Path) -> None:
    """Catches a table or grid wider than 390 pixels."""
    action = (
        "parent.postMessage([innerWidth, document.documentElement.scrollWidth,"
        "...[...document.querySelectorAll('.scroll, .shown .grid-side')]"
        ".map((part) => part.scrollWidth - part.clientWidth)].join(' '), '*')"
    )
    frame = in_frame(with_script(report, tmp_path, action), 390)
    assert told(open_page(browser, frame, "", tmp_path / "profile")) == "390 390 0 0"
