"""`data`: make, check and rewrite shards; check what evaluators read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradeclip_ft.commands.config import ConfigurationError, suggest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gradeclip_ft.data.check import Findings, Report
    from gradeclip_ft.data.make_shards import CaptionedFile


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

    from gradeclip_ft.data.captions import shard_sizes
    from gradeclip_ft.data.shards import expand_shards

    sizes = shard_sizes(expand_shards(shards, allow_pipe=allow_pipe))
    _print_sizes({name: entry["samples"] for name, entry in sizes.items()})
    if out is not None:
        out.write_text(json.dumps(sizes, indent=1))
        print(f"wrote {out}")
    return 0


def verify(*, shards: Shards, workers: int = 2, allow_pipe: bool = False) -> int:
    """Read every sample as training does, and print what would be skipped."""
    from gradeclip_ft.data.check import Report, verify_shard
    from gradeclip_ft.data.shards import expand_shards

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
    from gradeclip_ft.data.pairs import coco_files

    return _write(coco_files(captions, images, exclude), out, name, shard_size)


def folder(
    *, table: Path, images: Path, out: Path, name: str = "part", shard_size: int = 1000
) -> int:
    """Make shards from a folder of images and a table of captions."""
    from gradeclip_ft.data.pairs import table_files

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

    from gradeclip_ft.data.make_shards import add_phrases
    from gradeclip_ft.data.shards import expand_shards
    from gradeclip_ft.text.phrases import prepare_tagger

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
    from gradeclip_ft.data.make_shards import split_shards
    from gradeclip_ft.data.shards import expand_shards

    urls = expand_shards(shards, allow_pipe=allow_pipe)
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


SHOWN = 5


def check(
    *,
    evaluators: Sequence[str],
    annotations: Path | None = None,
    images: Path | None = None,
    segments: Path | None = None,
    folder: Path | None = None,
    part: str | None = None,
    against: str | None = None,
    read: bool = False,
) -> int:
    """Open the data of evaluators as `evaluate` does, and print what they hold."""
    from gradeclip_ft.data.check import training_images

    given = {
        "annotations": annotations,
        "images": images,
        "segments": segments,
        "folder": folder,
        "part": part,
    }
    options = {key: str(value) for key, value in given.items() if value is not None}
    seen = None if against is None else training_images(against)
    good = [_check(name, options, seen, read=read) for name in evaluators]
    return 0 if all(good) else 1


def _check(name: str, options: dict[str, str], seen: set[str] | None, *, read: bool) -> bool:
    """Print what one evaluator's data hold; whether all is well."""
    from gradeclip_ft.commands.build import make
    from gradeclip_ft.commands.cli import tracked
    from gradeclip_ft.data.check import image_key, inspect

    node = _data(name, options)
    try:
        found = inspect(make(node), read=read, track=tracked)
    except (FileNotFoundError, ValueError) as error:
        print(f"{name}: {error}")
        return False
    _print(name, found, read=read)
    overlap = [image for image in found.images if seen is not None and image_key(image) in seen]
    if seen is not None:
        print(f"  in the training data too: {_some(overlap, len(found.images))}")
    return not overlap and not found.unreadable


def _data(name: str, options: dict[str, str]) -> DictConfig:
    """The data node of an evaluator with the user's paths."""
    from gradeclip_ft.commands.config import compose

    node: DictConfig = compose("evaluate", [f"evaluator={name}"]).evaluator[name].data
    for key, value in options.items():
        if key not in node:
            known = [word for word in map(str, node) if not word.startswith("_")]
            raise ConfigurationError(f"{name} has no {key}=; its data take {', '.join(known)}")
        node[key] = value
    return node


def _print(name: str, found: Findings, *, read: bool) -> None:
    skipped = found.counts.get("skipped") or {}
    counts = [f"{n:,} {what}" for what, n in found.counts.items() if isinstance(n, int)]
    print(f"{name}: {', '.join(counts)}")
    for cause, number in skipped.items():
        print(f"  left out: {number:,} ({cause})")
    if found.classes:
        print(f"  classes without a sample: {_some(found.absent, len(found.classes))}")
    if found.captions:
        by_number = ", ".join(f"{number} x {n}" for n, number in sorted(found.captions.items()))
        print(f"  images by number of captions: {by_number}")
    if read:
        print(f"  not readable: {_some(found.unreadable, len(found.images))}")


def _some(names: Sequence[str], total: int) -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names):,} of {total:,}{': ' + shown if names else ''}"


Action = Literal["make", "count", "verify", "check", "coco", "folder", "phrases", "split"]


def data(
    action: Action,
    *words: str,
    shards: str | None = None,
    captions: Path | None = None,
    table: Path | None = None,
    images: Path | None = None,
    exclude: Path | None = None,
    annotations: Path | None = None,
    segments: Path | None = None,
    folder: Path | None = None,
    part: str | None = None,
    against: str | None = None,
    read: bool | None = None,
    out: Path | None = None,
    name: str | None = None,
    shard_size: int | None = None,
    tagger: Literal["auto", "nltk", "textblob"] | None = None,
    max_phrases: int | None = None,
    train: int | None = None,
    val: int | None = None,
    seed: int | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    allow_pipe: bool | None = None,
) -> int:
    """Make, check and rewrite shards of captioned images, in CC3M's layout.

    data make shapes [out=data/shapes] [train=10000] [val=1000] [seed=0] [image_size=64] [workers=2]
        The shapes world: training shards, evaluation files in COCO's layout.
    data count SHARDS [out=FOLDER/sizes.json]
        Samples per shard. The file is needed to read remote shards without resampling.
    data verify SHARDS [workers=2]
        Reads everything as training does; exit code 1 if anything would be skipped.
    data check EVALUATOR ... [annotations=FILE] [images=FOLDER] [segments=FOLDER] [folder=FOLDER]
            [part=test] [against=FILE.json|SHARDS] [read=true]
        What an evaluator will read: counts, missing files, classes without samples, number of
        captions; with `against` images that those training data hold too, with `read` images that
        cannot be decoded. Exit code 1 if anything is wrong. `list evaluators` names them.
    data coco captions=FILE.json images=FOLDER out=FOLDER [exclude=FILE.json] [name=coco]
            [shard_size=1000]
        Shards from a COCO captions file. Images of the file `exclude` are left out.
    data folder table=FILE images=FOLDER out=FOLDER [name=part] [shard_size=1000]
        Shards from a folder and a .csv, .tsv or .txt table of file name and caption.
    data phrases SHARDS out=FOLDER [tagger=auto|nltk|textblob] [max_phrases=20] [workers=2]
        The shards again, with phrases in each sample's JSON; training then need not find them.
        `out` may be the folder of the shards.
    data split SHARDS out=FOLDER [name=part] [shard_size=1000]
        The same samples in more, smaller shards.

    SHARDS stand behind the action or as shards=...: files, folders, globs, addresses, brace lists
    such as 'cc3m-train-{0000..0575}.tar'. allow_pipe=true accepts pipe:COMMAND in
    count, verify, phrases and split.
    """
    given = {key: value for key, value in locals().items() if key not in ("action", "words")}
    options = {key: value for key, value in given.items() if value is not None}
    _bind(action, words, options)
    return SUBCOMMANDS[action](**options)


def _bind(action: Action, words: tuple[str, ...], options: dict[str, object]) -> None:
    """Add the shards to the options, and refuse what the sub-command does not take."""
    known = inspect.signature(SUBCOMMANDS[action]).parameters
    if "shards" in known and words:
        if "shards" in options:
            raise ConfigurationError(f"{words[0]}: shards stand here or as shards=, not both")
        options["shards"] = list(words)
    elif "evaluators" in known and words:
        options["evaluators"] = list(words)
    elif words != (("shapes",) if action == "make" else ()):
        wanted = "`data make shapes`" if action == "make" else "key=value alone"
        raise ConfigurationError(f"data {action} {' '.join(words)}: expected {wanted}")
    for key in options:
        if key not in known:
            raise ConfigurationError(f"data {action} has no option {key}; {suggest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            wanted = "the name of an evaluator" if key == "evaluators" else f"{key}=..."
            raise ConfigurationError(f"data {action}: {wanted} is missing; see data --help")


SUBCOMMANDS: dict[str, Callable[..., int]] = {
    "make": make,
    "count": count,
    "verify": verify,
    "check": check,
    "coco": coco,
    "folder": folder,
    "phrases": phrases,
    "split": split,
}
