"""The user study: its two pages, and the test over participants."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tools import study

CAPTIONS = ["a red circle", "a blue </script> star", "a red circle"]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Five pictures of three captions, one with a single one."""
    random = np.random.default_rng(0)
    images = [{"id": n, "file_name": f"{n}.png", "height": 64, "width": 64} for n in range(5)]
    said = [{"image_id": n, "caption": text} for n in range(4) for text in CAPTIONS]
    said.append({"image_id": 4, "caption": "a star"})
    for image in images:
        pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(image["file_name"]))
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return path


def test_two_pages_exchange_the_pictures_of_their_sets(tmp_path: Path, captions: Path) -> None:
    """Every picture is seen with maps on one page and without on the other; nothing is fetched."""
    study.study(captions=captions, images=tmp_path, count=3, examples=1, out=tmp_path / "study")
    sets = {}
    for version in "ab":
        text = (tmp_path / "study" / f"{version}.html").read_text()
        assert "http://" not in text
        assert "https://" not in text
        (found,) = re.findall(r"const study = (.*);", text)
        content = json.loads(found)
        assert [len(some) for some in content["sets"]] in ([1, 2], [2, 1])
        sets[version] = [[one["name"] for one in some] for some in content["sets"]]
        first = content["sets"][0][0]
        assert first["captions"] == ["a red circle", "a blue </script> star"]
        assert all(uri.startswith("data:image/png") for uri in [first["photo"], *first["maps"]])
        assert first["scores"][0] != first["scores"][1]
    assert sets["a"] == sets["b"][::-1]
    with pytest.raises(ValueError, match="4 pictures have two captions, 6 are asked for"):
        study.study(captions=captions, images=tmp_path, count=4, examples=2, out=tmp_path)


def test_answers_are_scored_by_participant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares are of participants; one who stopped before the maps is left out and counted."""
    rights = [([1, 0], [1, 1]), ([0, 0], [1, 0]), ([1, 1], [1, 1]), ([1], [])]
    for number, sets in enumerate(rights):
        lines = ["participant,version,picture,maps,choice,right,seconds"]
        for maps, some in enumerate(sets):
            lines += [f'"p{number}",a,"x.png",{maps},1,{right},2.0' for right in some]
        (tmp_path / f"{number}.csv").write_text("\n".join(lines) + "\n")
    study.score(*(str(path) for path in sorted(tmp_path.glob("*.csv"))))
    shown = capsys.readouterr().out
    assert "participants 3; incomplete and left out 1" in shown
    assert "right without maps 50.0%, with maps 83.3%" in shown
    expected = stats.ttest_rel([1, 0.5, 1], [0.5, 0, 1])
    assert f"paired t(2) = {expected.statistic:.3f}, p {expected.pvalue:.3f}" in shown
    assert stats.t.sf(1.904, 33) == pytest.approx(0.0328, abs=1e-4)  # the journal's p
    with pytest.raises(ValueError, match="0 participants answered both sets"):
        study.score(str(tmp_path / "3.csv"))
