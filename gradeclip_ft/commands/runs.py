"""Run directories, `runs/<name>/`, and the rule that a run is begun, resumed or refused.

Every process of a job and every restart of it comes to the same folder, so nothing here depends on
the time. Only rank 0 writes. A folder that already holds a run is never overwritten: the run is
continued on request (`resume=auto`) or another name is taken.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.config import recorded, suggest
from gradeclip_ft.results.masking import masked_values
from gradeclip_ft.results.record import commit, read_mapping, versions, write_atomically
from gradeclip_ft.training import run_files
from gradeclip_ft.training.run_files import METRICS_CSV, METRICS_JSONL, damage, newest_good

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
CHECKPOINT, WEIGHTS = run_files.CHECKPOINT, run_files.WEIGHTS
# Any of these makes a folder a run. Other files in it are none of our business.
TRACES = (CONFIG, CHECKPOINT, WEIGHTS, METRICS_JSONL, METRICS_CSV)
# Any of these came of a run.
OUTCOMES = (*TRACES[1:], "non_finite.jsonl", "evaluations")
# What a resumed run may change, because the weights it ends with do not depend on it.
MAY_CHANGE = (
    "resume",
    "runs_dir",
    "evaluation",
    "evaluator",
    "plugins",  # its classes are compared where they are named
    "logger",
    "trainer.stop_at",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.max_non_finite",
    "data.max_dropped",
    "trainer.keep",
    "trainer.on_save_error",
    "trainer.timeout_minutes",
    "trainer.threads",
    # Other processes: the loader knows what they mean, and refuses them where samples have owners.
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
# The same for data that are drawn with replacement.
RESAMPLED_MAY_CHANGE = ("data.batch_size", "data.workers")

Json = Any
logger = logging.getLogger(__name__)


def run_dir(name: str, runs_dir: str | Path = "runs") -> Path:
    """Folder of the run called `name`.

    Raises:
        ValueError: If the name could leave `runs_dir` or is not a portable file name.
    """
    if not re.fullmatch(r"[\w=+@,][\w.=+@,-]*", name, re.ASCII):
        raise ValueError(
            f"name={name!r} is not a valid run name; "
            "use letters, digits and any of . _ - = + @ , and begin with a letter or a digit"
        )
    return Path(runs_dir) / name


def claim(
    folder: Path,
    cfg: DictConfig | Mapping[str, Json],
    *,
    resume: Literal["auto"] | None = None,
    rank: int = 0,
) -> Path | None:
    """Take the folder for this job and record its configuration.

    With resume="auto" the run that the folder holds is continued, or begins if there is none.
    Ranks above 0 neither write nor refuse.

    Returns:
        The newest good checkpoint to continue from, or None for a run that begins.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is None.
        ValueError: If the run to continue was made from another configuration, or all its
            checkpoints are damaged.
    """
    if rank == 0:
        begins = would_begin_or_continue(folder, cfg, resume=resume) == "begins"
        folder.mkdir(parents=True, exist_ok=True)
        if begins:
            try:  # two jobs of one name start at once: one of them gets the folder
                (folder / CONFIG).open("x").close()
            except FileExistsError:
                raise FileExistsError(_refusal(folder)) from None
        if not _recorded_settings(folder):  # new, or emptied by a crash
            write_atomically(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(_settings(cfg))))
        start = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(["python", "-m", "gradeclip_ft", *sys.argv[1:]]),
            "commit": commit(),
            "versions": versions(),
        }
        earlier = read_environment(folder).get("starts", [])
        record(folder, {**start, "starts": [*earlier, start]})
    return newest_good(folder) if resume == "auto" else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training the run in this folder.

    The lock ends with this process, however it ends: forked loader workers do not inherit it.

    Raises:
        FileExistsError: Another process holds it, or the folder is a file.
    """
    _require_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FileExistsError(
                f"{folder} is being trained by {file.read() or 'another process'}; wait until it "
                "ends, or stop it, before resume=auto continues the run"
            ) from None
        except (ImportError, OSError) as error:
            logger.warning("%s cannot be locked (%s); start no second process there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def would_begin_or_continue(
    folder: Path, cfg: DictConfig | Mapping[str, Json], *, resume: Literal["auto"] | None = None
) -> Literal["begins", "continues"]:
    """What `claim` would do with this folder; raises as it does, and writes nothing."""
    _require_folder(folder)
    if not any((folder / trace).exists() for trace in TRACES):
        return "begins"
    if resume != "auto":
        raise FileExistsError(_refusal(folder))
    before = _recorded_settings(folder)
    if not before:
        logger.warning("%s is missing or cut off; it is written again", folder / CONFIG)
        return "continues"
    drawn = (before.get("data") or {}).get("resampled") is True
    may_change = (*MAY_CHANGE, *(RESAMPLED_MAY_CHANGE if drawn else ()))
    changed = [
        f"  {key}: {old!r} -> {new!r}"
        for key, old, new in _differences(before, _settings(cfg))
        if not any(f"{key}.".startswith(f"{free}.") for free in may_change)
    ]
    if changed:
        raise ValueError(
            f"{folder} was made from another configuration; resume=auto continues the same run.\n"
            + "\n".join(changed[:10])
            + "\nTake these changes back, or start another run with name=... "
            f"(init_from={folder.name} begins with its weights)"
        )
    return "continues"


def _settings(cfg: DictConfig | Mapping[str, Json]) -> dict[str, Json]:
    """For the record; files of the model by absolute paths, so that any folder will do."""
    settings = recorded(cfg)
    model = settings.get("model") or {}
    for key in ("name", "weights"):
        value = str(model.get(key) or "")
        prefix = next((one for one in ("local-dir:", "blip:") if value.startswith(one)), "")
        if value and (file := Path(value.removeprefix(prefix))).exists():
            model[key] = f"{prefix}{file.absolute()}"
    return settings


def _recorded_settings(folder: Path) -> dict[str, Json]:
    """What config.yaml holds; empty where a crash left it without contents."""
    try:
        return _settings(read_config(folder))
    except (FileNotFoundError, ValueError):
        return {}


def record(folder: Path, facts: Mapping[str, Json]) -> None:
    """Merge facts (the tagger used, the shards found) into `environment.json`. Rank 0 only."""
    merged = {**read_environment(folder), **masked_values(facts)}
    write_atomically(folder / ENVIRONMENT, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def read_environment(folder: Path) -> dict[str, Json]:
    """What `environment.json` holds; empty before the run began, or where a crash emptied it."""
    return read_mapping(folder / ENVIRONMENT)


def read_config(folder: Path) -> DictConfig:
    """Configuration that a run was made from.

    Raises:
        FileNotFoundError: If the folder holds no run; names runs that sound alike.
        ValueError: The file is empty, cut off, or something else.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no run in {folder} (it has no {CONFIG}); {_known(folder)}")
    try:
        cfg = OmegaConf.load(path)
    except Exception:  # of yaml or OmegaConf, on arbitrary bytes
        cfg = None
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ValueError(
            f"{path} is empty or cut off; start `train` again with resume=auto and the settings of "
            "the run, which writes it again"
        )
    return cfg


def names_run(spec: str | Path, runs_dir: str | Path = "runs") -> bool:
    """Whether this is a run: its name, its folder, or a file in there."""
    path = Path(spec)
    folders = (path.parent if path.is_file() else path, Path(runs_dir) / path)
    return any((folder / CONFIG).is_file() for folder in folders)


def resolve_weights(spec: str | Path, runs_dir: str | Path = "runs") -> Path:
    """Weights file that `init_from=` or `run=` names: a file, a run's folder, or a run's name.

    Raises:
        FileNotFoundError: If it is none of them, or the run has not saved weights yet.
        ValueError: If the run's weights are damaged.
    """
    path = Path(spec)
    if path.is_file():
        return path
    folder = path if path.is_dir() and (path / CONFIG).exists() else None
    if folder is None and len(path.parts) == 1:
        folder = run_dir(str(spec), runs_dir)
    if folder is not None and (folder / WEIGHTS).is_file():
        weights = folder / WEIGHTS
        if reason := damage(weights):
            raise ValueError(f"{weights}: {reason}. Write it again with resume=auto of the run")
        return weights
    if folder is not None and (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"run {folder} has no {WEIGHTS} yet; it is written with the first checkpoint"
        )
    raise FileNotFoundError(
        f"{spec!s} is neither a weights file nor a run; {_known(Path(runs_dir) / path.name)}"
    )


def _require_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name= or runs_dir=")


def _refusal(folder: Path) -> str:
    places = (folder.with_name(f"{folder.name}_{number}") for number in count(2))
    free = next(place.name for place in places if not place.exists())
    return (
        f"{folder} already holds a run; continue it with resume=auto, start another with "
        f"name={free}, or start another from its weights with name={free} init_from={folder.name}"
    )


def _differences(before: Json, now: Json, key: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Dotted keys whose values differ. A key that is absent counts as null."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield key, before, now


def _known(folder: Path) -> str:
    """Runs beside `folder`, the likely one first."""
    runs = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG}"))
    return suggest(folder.name, runs) if runs else f"there are no runs in {folder.parent}"
