"""`data`: make, check and rewrite shards; check what evaluators read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gradeclip_ft.commands import data_actions, data_check
from gradeclip_ft.commands.compose import ConfigurationError
from gradeclip_ft.commands.names import suggest

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
    "make": data_actions.make,
    "count": data_actions.count,
    "verify": data_actions.verify,
    "check": data_check.check,
    "coco": data_actions.coco,
    "folder": data_actions.folder,
    "phrases": data_actions.phrases,
    "split": data_actions.split,
}
