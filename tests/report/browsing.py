"""A page in a real browser, without a driver: read what its document becomes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
    "--virtual-time-budget=2000",
)


def open_page(browser: str, report: Path, state: str, profile: Path) -> str:
    """The document after its script ran."""
    user = f"--user-data-dir={profile}"
    command = [browser, *FLAGS, user, "--dump-dom", report.as_uri() + state]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def shown(dom: str) -> tuple[str, int]:
    """What the visible case's stage says, and the hot patch of the map on it."""
    case = re.search(r'<article class="case[^"]* shown".*?</article>', dom, re.DOTALL)
    assert case is not None
    stage = case.group(0).split('<figure class="stage"')[1].split("</figure>")[0]
    name = re.search(r'<span class="now">([^<]*)</span>', stage)
    values = re.search(r'data-values="([^"]*)"', stage)
    assert name is not None
    assert values is not None
    return name.group(1), values.group(1).split().index("100")


def told(dom: str) -> str:
    """What a script put into the title."""
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    return title.group(1) if title else ""


def with_script(report: Path, folder: Path, action: str) -> Path:
    """A copy of the page with one more script at its end."""
    script = (
        "<script>{ const root = document.getElementById('cases');"
        "const press = (key) => document.dispatchEvent(new KeyboardEvent('keydown', { key }));"
        f"const tell = (text) => {{ document.title = text; }}; {action} }}</script>"
    )
    text = report.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    copy = folder / "acted.html"
    copy.write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
    return copy


def in_frame(page: Path, width: int) -> Path:
    """A page that shows another in a frame, as windows have a least width; its title is told."""
    frame = page.with_name("frame.html")
    frame.write_text(
        "<script>onmessage = (event) => { document.title = event.data; }</script>"
        f'<iframe style="width: {width}px; border: 0" src="{page.name}"></iframe>'
    )
    return frame
