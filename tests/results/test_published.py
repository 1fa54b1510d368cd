"""Numbers of the papers beside ours: the file itself, columns, marks, pages."""

import json
from pathlib import Path

import numpy as np
import pytest

from gradeclip_ft.commands.compare import compare
from gradeclip_ft.results.collect import collect
from gradeclip_ft.results.published import GROUPS, PATH, published
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import grouped, tabulate

TABLES = json.loads(PATH.read_text())


def result(name: str, folder: Path, *, images: int = 4998, **protocol: object) -> None:
    Result(
        evaluator=name,
        metrics={"boxes/top1": 0.42, "boxes/top5": 0.61},
        protocol={**TABLES["table7"]["protocol"], "image_size": 224, "more": 1, **protocol},
        data={"hash": "a", "counts": {"images": images, "skipped": {"image without regions": 2}}},
        weights={"name": "mine", "hash": "b"},
        versions={},
    ).write(folder)


def test_every_row_has_source_protocol_and_fractions() -> None:
    """A percentage among fractions would be shown as 4140 %."""
    assert {"table7", "table9", "flickr30k_test", "regions_1024", "instances"} < set(TABLES)
    for name, table in TABLES.items():
        assert table["source"]
        assert "task" in table["protocol"]
        if not table.get("methods") and "images" in table:
            assert table["images"] in (1000, 1014, 4836, 5000, 50000)
        for row in table["rows"]:
            assert np.min(row["protocol"].get("image_size", 224)) >= 224
            if name not in ("table5", "journal9"):  # seconds, divergences
                assert all(-0.5 < value < 1 for value in row["metrics"].values())


def test_tables_of_methods_agree_with_what_the_papers_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Printed IMD values against the areas beside them; quirks come with the table."""
    (one,) = TABLES["table1"]["rows"]
    imd = [one["metrics"][f"grad_eclip/imd_{column}"] for column in ("true@1", "predicted@5")]
    assert imd == pytest.approx([0.137, 0.133], abs=6e-4)
    (two,) = TABLES["table2"]["rows"]
    assert two["metrics"]["game/imd_text@1"] == pytest.approx(0.012, abs=6e-4)
    (depth,) = TABLES["table6"]["rows"]
    assert depth["metrics"]["depth_8/imd_text@1"] == pytest.approx(0.0766, abs=1e-4)
    compare(published=("table1",))
    shown = capsys.readouterr().out
    assert "grad_eclip_none" in shown.splitlines()[9]
    assert "the journal prints .070 for CLIPSurgery" in shown


def test_numbers_are_those_of_the_papers() -> None:
    """Spot checks by eye against the tables."""
    rows = {row["row"]: row["metrics"] for row in TABLES["table7"]["rows"]}
    ours = (0.573, 0.783, 0.493, 0.722, 0.183, 0.511)
    assert tuple(rows["B/16, local loss, Grad-ECLIP"].values()) == ours
    assert rows["L/14, untouched"]["boxes/top1"] == 0.581
    flickr = {row["row"]: row["metrics"] for row in TABLES["table9"]["rows"]}
    assert flickr["B/16, untouched"]["image_retrieval_recall@1"] == 0.736
    assert flickr["L/14, local loss, Grad-ECLIP"]["text_retrieval_recall@10"] == 0.998


def test_the_same_protocol_as_the_paper_is_unmarked(tmp_path: Path) -> None:
    """4,998 images with regions and 2 without are the paper's 5,000."""
    result("mine_224", tmp_path / "a")
    entries = collect([str(tmp_path / "a")])
    table = tabulate([*entries, *published(["table7"], entries)])
    marks = {row.get("published"): row["differs"] for row in table.rows}
    assert marks["B/16, untouched"] is None
    assert marks["L/14, untouched"] == "mine_224: image_size 336 instead of 224"
    assert [row["boxes/top1"] for row in table.rows][:2] == [0.42, 0.414]
    assert [row["step"] for row in table.rows][:2] == [0, None]
    (note,) = table.notes
    assert note.startswith("table7, L/14, untouched and 2 more: not comparable")


def test_other_data_and_protocols_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shapes world beside Table 7 must not look like a result on COCO."""
    result("shapes", tmp_path / "a", images=998, classes=69)
    compare(str(tmp_path / "a"), published=("table7",))
    shown = capsys.readouterr().out
    assert "classes 133 instead of 69" in shown
    assert "other data, 5000 images instead of 1000" in shown
    assert shown.count("≠") == 8


def test_the_nearest_evaluator_takes_the_papers_columns_and_no_group_their_rows(
    tmp_path: Path,
) -> None:
    """A mean over our runs and the paper's would be neither."""
    result("far", tmp_path / "a", classes=80, templates="own")
    result("near", tmp_path / "a")
    entries = collect([str(tmp_path / "a")])
    assert {*published(["table7"], entries)[0].results} == {"near"}
    assert {*published(["table9"], entries)[0].results} == {"table9"}
    table = grouped(tabulate([*entries, *published(["table7"], entries)]), ["map"])
    assert [row.get("rows") for row in table.rows] == [1, *[None] * 8]
    assert table.rows[0]["near:boxes/top1"] == 0.42
    assert "published" in table.facts


def test_the_source_of_published_numbers_is_written_with_them(tmp_path: Path) -> None:
    compare(published=("table7",), out=str(tmp_path / "t"))
    assert "Grad-ECLIP (first extended version), Table 7" in (tmp_path / "t.md").read_text()
    compare(published=("table7",), out=str(tmp_path / "t.csv"))
    assert "0.414" in (tmp_path / "t.csv").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.json", "t.md"]


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="no published table10; there are table7, table8, table9"):
        compare(published=("table10",))


def test_segmentation_is_one_table_of_eight_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Methods are rows and sets columns; with results, only the sets that they are of."""
    compare(published=("segmentation",))
    shown = capsys.readouterr().out
    header, sclip = shown.splitlines()[0], next(x for x in shown.splitlines() if "sclip" in x[:5])
    assert header.split()[1:] == [f"{name}/mIoU" for name in GROUPS["segmentation"]]
    assert sclip.split()[1:] == ["59.1", "30.4", "30.5", "80.4", "34.2", "22.4", "32.2", "16.1"]
    assert "up to 0.3 points" in shown
    for name, split, images in (("voc20", "VOC2012 val", 1449), ("ade20k", "ADE20K val", 2000)):
        Result(
            evaluator=name,
            metrics={"naclip/mIoU": 0.796, "sclip/mIoU": 0.16},
            protocol={"task": "segmentation", "split": split, "image_size": 336},
            data={"hash": name, "counts": {"images": images}},
            weights={"name": "ViT-B-16", "hash": "b"},
            versions={},
        ).write(tmp_path / "mine")
    compare(str(tmp_path / "mine"), published=("segmentation",))
    shown = capsys.readouterr().out
    columns = shown.splitlines()[0].split("  ")
    assert [c.strip() for c in columns if c.strip()][1:] == [
        *("ViT-B-16 ade20k/mIoU", "ade20k/mIoU", "ViT-B-16 voc20/mIoU", "voc20/mIoU"),
    ]
    naclip = next(line for line in shown.splitlines() if line.startswith("naclip"))
    assert naclip.split()[1:] == ["79.6", "17.4", "79.6", "79.7"]
    assert "not comparable" not in shown
