"""The actions of `data`, each a function whose typed options are those of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradeclip_ft.commands.compose import ConfigurationError

if TYPE_CHECKING:
    from gradeclip_ft.data.shards import CaptionedFile
    from gradeclip_ft.data.verify import Report

Shards = str | Sequence[str]


def make(
    *,
    out: Path = Path("data/shapes"),
    train: int = 10_000,
    val: int = 1_000,
    seed: int = 0,
    image_size: int = 64,
    workers: int = 2,
) -> int:
    """Write the shapes world, unless it stands there already."""
    from gradeclip_ft.data.shapes import make_shapes

    make_shapes(out, train=train, val=val, seed=seed, workers=workers, image_size=image_size)
    print(f"{out}: {train} training and {val} evaluation scenes")
    return 0


def count(*, shards: Shards, out: Path | None = None, allow_pipe: bool = False) -> int:
    """Print and, with `out`, write the number of samples of each shard."""
    import json

    from gradeclip_ft.data.sizes import shard_sizes
    from gradeclip_ft.data.stream import expand_shards

    sizes = shard_sizes(expand_shards(shards, allow_pipe=allow_pipe))
    _print_sizes({name: entry["samples"] for name, entry in sizes.items()})
    if out is not None:
        out.write_text(json.dumps(sizes, indent=1))
        print(f"wrote {out}")
    return 0


def verify(*, shards: Shards, workers: int = 2, allow_pipe: bool = False) -> int:
    """Read every sample as training does, and print what would be skipped."""
    from gradeclip_ft.data.stream import expand_shards
    from gradeclip_ft.data.verify import Report, verify_shard

    urls = expand_shards(shards, allow_pipe=allow_pipe)
    total = Report()
    for url, report in _in_parallel(verify_shard, urls, workers):
        total.join(report)
        if report.usable < report.samples or report.causes:
            print(f"{url}: {report.usable} of {report.samples} samples usable")
    _print_report(total)
    return 1 if total.causes or not total.usable else 0


def coco(
    *,
    captions: Path,
    images: Path,
    out: Path,
    exclude: Path | None = None,
    name: str = "coco",
    shard_size: int = 1000,
) -> int:
    """Make shards from a COCO captions file."""
    from gradeclip_ft.data.captioned_files import coco_files

    return _write(coco_files(captions, images, exclude), out, name, shard_size)


def folder(
    *, table: Path, images: Path, out: Path, name: str = "part", shard_size: int = 1000
) -> int:
    """Make shards from a folder of images and a table of captions."""
    from gradeclip_ft.data.captioned_files import table_files

    return _write(table_files(table, images), out, name, shard_size)


def phrases(
    *,
    shards: Shards,
    out: Path,
    tagger: Literal["auto", "nltk", "textblob"] = "auto",
    max_phrases: int = 20,
    workers: int = 2,
    allow_pipe: bool = False,
) -> int:
    """Write shards with the phrases of all captions in each sample's JSON."""
    from collections import Counter

    from gradeclip_ft.data.rewrite import add_phrases
    from gradeclip_ft.data.stream import expand_shards
    from gradeclip_ft.text.taggers import prepare_tagger

    urls = expand_shards(shards, allow_pipe=allow_pipe)
    used = prepare_tagger(tagger)
    out.mkdir(parents=True, exist_ok=True)
    total: Counter[str] = Counter()
    work = partial(add_phrases, out=out, tagger=used, max_phrases=max_phrases)
    for url, numbers in _in_parallel(work, urls, workers):
        print(f"{url}: {', '.join(f'{key} {value}' for key, value in numbers.items())}")
        total += numbers
    print(f"{len(urls)} shards in {out}, tagger {used}, max_phrases {max_phrases}")
    if total["captions"]:
        print(
            f"{total['phrases'] / total['captions']:.2f} phrases per caption; without a phrase: "
            f"{total['captions_without_phrase'] / total['captions']:.1%}"
        )
    return 0


def split(
    *,
    shards: Shards,
    out: Path,
    name: str = "part",
    shard_size: int = 1000,
    allow_pipe: bool = False,
) -> int:
    """Write the same samples in more, smaller shards."""
    from gradeclip_ft.data.rewrite import split_shards
    from gradeclip_ft.data.stream import expand_shards

    urls = expand_shards(shards, allow_pipe=allow_pipe)
    _print_sizes(split_shards(urls, out, name=name, shard_size=shard_size))
    return 0


def _write(files: Sequence[CaptionedFile], out: Path, name: str, shard_size: int) -> int:
    from gradeclip_ft.data.shards import write_shards
    from gradeclip_ft.data.stream import Skips

    skips = Skips()
    sizes = write_shards(files, out, name=name, shard_size=shard_size, skips=skips)
    _print_sizes(sizes)
    for cause, number in skips.total.items():
        print(f"left out: {number} of {len(files)} images ({cause})")
    return 0


def _in_parallel(
    function: Callable[[str], Any], urls: Sequence[str], workers: int
) -> Iterable[tuple[str, Any]]:
    """Results by shard, in order."""
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}; use 1 or more")
    return zip(urls, _results(function, urls, min(workers, len(urls))), strict=True)


def _results(function: Callable[[str], Any], urls: Sequence[str], workers: int) -> Iterator[Any]:
    if workers == 1:
        yield from map(function, urls)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(function, urls)


def _print_sizes(sizes: dict[str, int]) -> None:
    for name, number in sizes.items():
        print(f"{number:>9,}  {name}")
    print(f"{sum(sizes.values()):>9,}  samples in {len(sizes)} shards")


def _print_report(report: Report) -> None:
    print(f"{report.usable:,} of {report.samples:,} samples usable in {report.shards} shards")
    for cause, number in report.causes.most_common():
        print(f"{number:>9,}  {cause}, first {report.examples[cause]}")
    if report.looked_at and report.bordered > 0.05 * report.looked_at:
        print(
            f"warning: {report.bordered} of {report.looked_at} images have white bars at two sides,"
            " which spoil region maps; download with keep_ratio"
        )
