"""`data`: make, check and rewrite shards; check what evaluators read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradeclip_ft.commands.cli import call, progress_bar
from gradeclip_ft.commands.config import ConfigurationError, compose, suggest

if TYPE_CHECKING:
    from gradeclip_ft.data.make_shards import CaptionedFile


def make(
    world: Literal["shapes"],
    *,
    out: Path = Path("data/shapes"),
    train: int = 10_000,
    val: int = 1_000,
    seed: int = 0,
    image_size: int = 64,
    workers: int = 2,
) -> int:
    """The shapes world: training shards, evaluation files in COCO's layout."""
    from gradeclip_ft.data.shapes import make_shapes

    make_shapes(out, train=train, val=val, seed=seed, workers=workers, image_size=image_size)
    print(f"{out}: {train} training and {val} evaluation scenes")
    return 0


def count(*shards: str, out: Path | None = None, allow_pipe: bool = False) -> int:
    """Samples per shard, with `out` as JSON, which remote shards need without resampling."""
    from gradeclip_ft.data.captions import shard_sizes

    sizes = shard_sizes(_urls(shards, allow_pipe))
    _print_sizes({name: entry["samples"] for name, entry in sizes.items()})
    if out is not None:
        out.write_text(json.dumps(sizes, indent=1))
        print(f"wrote {out}")
    return 0


def verify(*shards: str, workers: int = 2, allow_pipe: bool = False) -> int:
    """Read everything as training does; exit code 1 if anything would be skipped."""
    from gradeclip_ft.data.check import Report, verify_shard

    urls = _urls(shards, allow_pipe)
    total = Report()
    for url, report in _in_parallel(verify_shard, urls, workers):
        total.join(report)
        if report.usable < report.samples or report.causes:
            print(f"{url}: {report.usable} of {report.samples} samples usable")
    print(f"{total.usable:,} of {total.samples:,} samples usable in {total.shards} shards")
    for cause, number in total.causes.most_common():
        print(f"{number:>9,}  {cause}, first {total.examples[cause]}")
    if total.looked_at and total.bordered > 0.05 * total.looked_at:
        print(
            f"warning: {total.bordered} of {total.looked_at} images have white bars at two sides, "
            "which spoil region maps; download with keep_ratio"
        )
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
    """Shards from a COCO captions file, without the images of the file `exclude`."""
    from gradeclip_ft.data.pairs import coco_files

    return _write(coco_files(captions, images, exclude), out, name, shard_size)


def folder(
    *, table: Path, images: Path, out: Path, name: str = "part", shard_size: int = 1000
) -> int:
    """Shards from a folder and a .csv, .tsv or .txt table of file name and caption."""
    from gradeclip_ft.data.pairs import table_files

    return _write(table_files(table, images), out, name, shard_size)


def phrases(
    *shards: str,
    out: Path,
    tagger: Literal["auto", "nltk", "textblob"] = "auto",
    max_phrases: int = 20,
    workers: int = 2,
    allow_pipe: bool = False,
) -> int:
    """The shards again, with phrases in each sample's JSON; training then need not find them.

    `out` may be the folder of the shards.
    """
    from gradeclip_ft.data.make_shards import add_phrases
    from gradeclip_ft.text.phrases import prepare_tagger

    urls = _urls(shards, allow_pipe)
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
    *shards: str,
    out: Path,
    name: str = "part",
    shard_size: int = 1000,
    allow_pipe: bool = False,
) -> int:
    """The same samples in more, smaller shards."""
    from gradeclip_ft.data.make_shards import split_shards

    urls = _urls(shards, allow_pipe)
    _print_sizes(split_shards(urls, out, name=name, shard_size=shard_size))
    return 0


def _write(files: Sequence[CaptionedFile], out: Path, name: str, shard_size: int) -> int:
    from gradeclip_ft.data.make_shards import write_shards
    from gradeclip_ft.data.shards import Skips

    skips = Skips()
    sizes = write_shards(files, out, name=name, shard_size=shard_size, skips=skips)
    _print_sizes(sizes)
    for cause, number in skips.total.items():
        print(f"left out: {number} of {len(files)} images ({cause})")
    return 0


def _urls(shards: Sequence[str], allow_pipe: bool) -> list[str]:
    from gradeclip_ft.data.shards import expand_shards

    if not shards:
        raise ConfigurationError("SHARDS are missing: files, a folder, a glob or addresses")
    return expand_shards(shards, allow_pipe=allow_pipe)


def _in_parallel(
    function: Callable[[str], Any], urls: Sequence[str], workers: int
) -> Iterator[tuple[str, Any]]:
    """Results by shard, in order."""
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}; use 1 or more")
    if min(workers, len(urls)) == 1:
        yield from zip(urls, map(function, urls), strict=True)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(min(workers, len(urls))) as pool:
        yield from zip(urls, pool.map(function, urls), strict=True)


def _print_sizes(sizes: dict[str, int]) -> None:
    for name, number in sizes.items():
        print(f"{number:>9,}  {name}")
    print(f"{sum(sizes.values()):>9,}  samples in {len(sizes)} shards")


def check(
    *evaluators: str,
    annotations: str | None = None,
    images: str | None = None,
    segments: str | None = None,
    folder: str | None = None,
    part: str | None = None,
    against: str | None = None,
    read: bool = False,
) -> int:
    """What an evaluator will read: counts, missing files, classes without samples, captions.

    `list evaluators` names them. With `against` images that those training data (FILE.json or
    SHARDS) hold too, with `read` images that cannot be decoded. Exit code 1 if anything is wrong.
    """
    from gradeclip_ft.data.check import training_images

    if not evaluators:
        raise ConfigurationError("the name of an evaluator is missing; `list evaluators`")
    paths = {"annotations": annotations, "images": images, "segments": segments}
    paths |= {"folder": folder, "part": part}
    given = {key: value for key, value in paths.items() if value is not None}
    seen = None if against is None else training_images(against)
    good = [_check(name, given, seen, read=read) for name in evaluators]
    return 0 if all(good) else 1


def _check(name: str, given: dict[str, str], seen: set[str] | None, *, read: bool) -> bool:
    """Print what one evaluator's data hold; whether all is well."""
    from gradeclip_ft.commands.build import make
    from gradeclip_ft.data.check import check_data, image_key

    node = compose("evaluate", [f"evaluator={name}"]).evaluator[name].get("data")
    if node is None:
        print(f"{name}: it reads no data")
        return True
    for key, value in given.items():
        if key not in node:
            known = [word for word in map(str, node) if not word.startswith("_")]
            raise ConfigurationError(f"{name} has no {key}=; its data take {', '.join(known)}")
        node[key] = value
    try:
        found = check_data(make(node, "data"), read=read, track=progress_bar)
    except (FileNotFoundError, ValueError) as error:
        print(f"{name}: {error}")
        return False
    counts = [f"{n:,} {what}" for what, n in found.counts.items() if isinstance(n, int)]
    print(f"{name}: {', '.join(counts)}")
    for cause, number in (found.counts.get("skipped") or {}).items():
        print(f"  left out: {number:,} ({cause})")
    if found.classes:
        print(f"  classes without a sample: {_some(found.absent, len(found.classes))}")
    if found.captions:
        by_number = ", ".join(f"{number} x {n}" for n, number in sorted(found.captions.items()))
        print(f"  images by number of captions: {by_number}")
    if read:
        print(f"  not readable: {_some(found.unreadable, len(found.images))}")
        for what, number in found.peculiar.items():
            print(f"  {what}: {number:,} (other programs may show them differently)")
    overlap = [image for image in found.images if seen is not None and image_key(image) in seen]
    if seen is not None:
        print(f"  in the training data too: {_some(overlap, len(found.images))}")
    return not overlap and not found.unreadable


def _some(names: Sequence[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names):,} of {total:,}{': ' + shown if names else ''}"


ACTIONS: dict[str, Callable[..., int]] = {
    action.__name__: action for action in (make, count, verify, check, coco, folder, phrases, split)
}


def data(*arguments: str) -> int:
    """Make, check and rewrite shards of captioned images, in CC3M's layout.

    SHARDS follow the action or are given as shards=...: files, folders, globs, addresses, brace
    lists such as 'cc3m-train-{0000..0575}.tar'. allow_pipe=true accepts pipe:COMMAND.
    """
    action, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if action not in ACTIONS:
        raise ConfigurationError(
            f"data {action}: there is no such action; {suggest(action, ACTIONS)}"
        )
    words: list[str] = []
    for word in rest:
        value = word.removeprefix("shards=")
        is_list = value != word and value.startswith("[")
        words += value.strip("[]").split(",") if is_list else [value]
    result: int = call(ACTIONS[action], words)
    return result
