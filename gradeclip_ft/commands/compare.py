"""`compare`: tables of results against each other and the papers."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gradeclip_ft.results import table as tables
from gradeclip_ft.results.collect import Steps, collect
from gradeclip_ft.results.published import (
    of_methods,
    published_quirks,
    published_sources,
    tables_of,
)
from gradeclip_ft.results.published import published as papers

Rows = Literal["auto", "weights", "methods"]


def compare(
    *runs: str,
    format: tables.Format = "text",
    steps: Steps = "ends",
    by: tuple[str, ...] = (),
    rows: Rows = "auto",
    fields: tuple[str, ...] = (),
    metrics: tuple[str, ...] = tables.MAIN,
    published: tuple[str, ...] = (),
    interval: bool = False,
    significance: bool = False,
    out: str | None = None,
) -> None:
    """Print results of runs side by side; rows whose protocol or data differ are marked.

    RUNS are folders such as runs/demo, or quoted patterns such as 'runs/maps_*'. Weights before
    training that several runs share are listed once. Columns say what a run was: map, heads,
    stop_gradient, loss, seed.

    format=text|markdown|csv   csv holds fractions, the others percent
    steps=ends|last|all        step 0 and the last one, the last one, or every evaluated step
    by=[map,heads]             mean ± sample deviation over the rows that agree in these columns
    rows=auto|weights|methods  one row per set of weights; or one per method, where an evaluation
                               has several: metrics=[*/pointing,*/energy]; auto: per method
                               where a table of a paper is
    significance=true          with rows=methods: p of the two best methods of each column
    fields=[lr=optim.lr]       more columns, from the configuration of each run
    metrics=[boxes/*]          which metrics to show; [*] for all
    published=[table7]         rows of the papers: table1 to table9, journal6, journal8, journal9,
                               iclip, iclip_coco, flickr30k_test, coco_5k, imagenet,
                               sugarcrepe, regions_1024, instances, follow_up, lvis, fg_ovd,
                               tips, segmentation (voc21, ade20k and six more); marked where
                               protocol or data differ
    interval=true              95 % intervals by bootstrap over images, and a row for the paired
                               difference of each row from its start, else from the first row of
                               the same start and alpha, on the same data; by= is left out
    out=results/NAME           also write results/NAME.md and results/NAME.json, one row per run;
                               out=NAME.csv or NAME.html (a page) writes that form alone
    """
    if interval and (by or published):
        raise ValueError("interval=true is about single runs; leave by= and published= out")
    asked = {}
    for item in fields:
        name, _, key = item.partition("=")
        if not name or not key:
            raise ValueError(f"fields={item}: write column=key, for example lr=optim.lr")
        asked[name] = key
    entries = collect(runs, steps=steps, fields=asked) if runs or not published else []
    asked_tables, published = published, tuple(tables_of(published, entries))
    others = papers(published, entries)
    if rows == "auto":
        rows = "methods" if of_methods(published) else "weights"
    if significance and (rows == "weights" or by):
        raise ValueError("significance=true compares methods; set rows=methods, and leave by= out")
    table = tables.tabulate([*entries, *others])
    if interval:
        from gradeclip_ft.results.intervals import with_intervals

        table = with_intervals(table, entries)
    table = replace(
        table,
        sources=(*table.sources, *published_sources(published)),
        notes=(*table.notes, *published_quirks(published)),
    )
    shown = tables.select(tables.grouped(table, by) if by else table, metrics)
    if rows == "methods":
        shown = tables.by_method(shown, by or ("run",))
    if significance:
        from gradeclip_ft.results.significance import with_significance

        shown = with_significance(shown, entries)
    print(tables.render(shown, format), end="")
    if out is None:
        return
    lists = {"by": by, "fields": fields, "metrics": metrics, "published": asked_tables}
    words = {
        "steps": steps,
        "rows": rows,
        "interval": str(interval).lower(),
        "significance": str(significance).lower(),
    }
    given = [f"{name}={value}" for name, value in words.items()]
    given += [f"{name}=[{','.join(words)}]" for name, words in lists.items()]
    defaults = (
        "steps=ends",
        "rows=weights",
        "interval=false",
        "significance=false",
        f"metrics=[{','.join(tables.MAIN)}]",
    )
    given = [word for word in given if word not in defaults and not word.endswith("=[]")]
    command = f"python -m gradeclip_ft compare {shlex.join([*runs, *given, f'out={out}'])}"
    notes = ["± is the sample standard deviation over the rows of a group."] if by else []
    if any(row["command"] for row in table.rows) and not out.endswith(".html"):
        notes.append("The JSON file holds one row per run, each with the command that trained it.")
    if out.endswith(".html"):
        from gradeclip_ft.report.page import write_table_page

        print(write_table_page(shown, Path(out), command=command, notes=notes))
        return
    for path in tables.write_table(Path(out), table, shown, command=command, notes=notes):
        print(path)
