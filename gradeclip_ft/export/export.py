"""One export from beginning to end: write aside, read back, compare, put in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gradeclip_ft.export.card import Origin, card, facts
from gradeclip_ft.export.evaclip import write_class_embed, write_evaclip
from gradeclip_ft.export.huggingface import write_huggingface
from gradeclip_ft.export.job import Job, Written, state_of, write_json
from gradeclip_ft.export.openclip import write_openclip
from gradeclip_ft.export.verify import Inputs
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.trace import Foreign
from gradeclip_ft.results.record import read_mapping

CARD = "README.md"
NOTE = "gradeclip_ft.json"
TARGETS: dict[str, Callable[[Job, Path], Written]] = {
    "openclip": write_openclip,
    "huggingface": write_huggingface,
    "evaclip": write_evaclip,
    "class_embed": write_class_embed,
}


def write_export(
    loaded: LoadedClip,
    target: str,
    folder: Path,
    origin: Origin,
    *,
    form: str = "safetensors",
    half: bool = False,
    pixels: Path | None = None,
) -> Written:
    """Write one format into a folder that appears complete or not at all.

    Args:
        loaded: The model, as it is to be exported.
        target: A key of `TARGETS`.
        folder: Absent, empty, or an earlier export in this format.
        origin: Where the weights come from.
        form: "safetensors" or "pt", for the target that has both.
        half: Round to fp16.
        pixels: Folder of photos to compare embeddings on; drawn pictures if None.

    Raises:
        ValueError: The model does not fit the format, or its weights are not finite.
        ExportError: Read back, it is another model; nothing is kept.
        FileExistsError: The folder holds something else.
    """
    job = Job(
        loaded=loaded,
        state=state_of(loaded, half=half),
        facts=facts(loaded, origin, target=target, half=half),
        inputs=Inputs.of(loaded, pixels),
        folder=folder,
        form=form,
    )
    with staged(folder, job.facts) as stage:
        written = TARGETS[target](job, stage)
        # The card travels: it names the folder, not where it was.
        told = replace(written, usage=written.usage.replace(str(folder), folder.absolute().name))
        (stage / CARD).write_text(card(job.facts, told), encoding="utf-8")
        note = {**job.facts, "checks": list(written.checks), "files": files_of(stage)}
        write_json(note, stage / NOTE)
    return written


@contextmanager
def staged(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into; its files are in `folder` once the block ends without an error.

    Raises:
        FileExistsError: The folder is neither absent nor empty, nor does it hold an earlier export
            of the same weights in the same format, whose files are replaced.
    """
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    earlier = _replaceable(target, facts)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as home:
        stage = Path(home) / target.name
        stage.mkdir()
        yield stage
        if not earlier:
            stage.replace(target)
            return
        names = files_of(stage)
        for name in [*names, NOTE]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).replace(target / name)
        for name in set(earlier) - {*names, NOTE}:
            if (target / name).resolve().is_relative_to(target.resolve()):
                (target / name).unlink(missing_ok=True)


def files_of(folder: Path) -> list[str]:
    """Files below a folder, relative to it, without the note."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NOTE)


def _replaceable(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Files of an earlier export that this one may replace; none where there is nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    found = f"files but no {NOTE}"
    if (folder / NOTE).is_file():
        note = read_mapping(folder / NOTE)
        same = "config_hash" if facts["run"] else "weights_hash"  # a run may have been continued
        if note.get("target") != facts["target"]:
            found = str(note.get("target"))
        elif any(note.get(key) != facts[key] for key in ("run", same)):
            found = f"an export of {note.get('run') or 'other weights'}"
        else:
            return [NOTE, *note.get("files", [])]
    raise FileExistsError(
        f"{folder} holds {found}, which an export of {facts['run'] or 'these weights'} to "
        f"{facts['target']} does not replace; remove it, or choose another folder with out=DIR"
    )


def mix(
    start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Weights between two states of one model, the temperature included; integers are `tuned`'s.

    Raises:
        ValueError: The share `alpha` of `tuned` is outside of 0 to 1, or the states are of two
            architectures.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is outside of 0 to 1: the share of the fine-tuned weights")
    shapes = ({(name, value.shape) for name, value in state.items()} for state in (start, tuned))
    differing = sorted({name for name, _ in set.symmetric_difference(*shapes)})
    if differing:
        raise ValueError(
            f"start and fine-tuned weights differ in {len(differing)} tensors, for example "
            f"{', '.join(differing[:3])}; mix weights of one architecture"
        )
    return {
        name: (alpha * value.double() + (1 - alpha) * start[name].double()).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in tuned.items()
    }


@contextmanager
def mixed(model: Foreign, start: Mapping[str, Tensor], alpha: float) -> Iterator[None]:
    """For a while, the share `alpha` of the model's weights and the rest of `start`; see `mix`."""
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    there = {name: value.to(tuned[name].device) for name, value in start.items()}
    model.load_state_dict(mix(there, tuned, alpha))
    try:
        yield
    finally:
        model.load_state_dict(tuned)
