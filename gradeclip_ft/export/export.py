"""One export from beginning to end: write aside, read back, compare, put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gradeclip_ft.export.card import Origin, card, facts
from gradeclip_ft.export.evaclip import write_class_embed, write_evaclip
from gradeclip_ft.export.huggingface import write_huggingface
from gradeclip_ft.export.job import NOTE, Job, Written, files_of, staged, state_of, write_json
from gradeclip_ft.export.openclip import code, write_openclip
from gradeclip_ft.export.verify import Inputs
from gradeclip_ft.models.clip import LoadedClip

CARD = "README.md"


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
    if target not in TARGETS:
        raise ValueError(f"to={target}: there is {', '.join(TARGETS)}; write to=[openclip]")
    job = Job(
        loaded=loaded,
        state=state_of(loaded, half=half),
        facts=facts(loaded, origin, target=target, half=half),
        inputs=Inputs.of(loaded, pixels),
        folder=folder,
        form=form,
    )
    with staged(folder, target) as stage:
        written = TARGETS[target](job, stage)
        # The card travels: it names the folder, not where it stood.
        told = replace(written, usage=written.usage.replace(str(folder), folder.absolute().name))
        (stage / CARD).write_text(card(job.facts, told), encoding="utf-8")
        note = {**job.facts, "checks": list(written.checks), "files": files_of(stage)}
        write_json(note, stage / NOTE)
    return written


def _class_embed(job: Job, stage: Path) -> Written:
    file = write_class_embed(job.loaded, stage)
    checks = (f"{file.name}: 80 classes and background, unit vectors read back bit-equal",)
    return Written(
        checks, code("import torch", f'vectors = torch.load("{job.folder / file.name}")')
    )


TARGETS: dict[str, Callable[[Job, Path], Written]] = {
    "openclip": write_openclip,
    "huggingface": write_huggingface,
    "evaclip": write_evaclip,
    "class_embed": _class_embed,
}


def mix(
    start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Weights between two states of one model, the temperature included.

    Only floating tensors are mixed; others are those of `tuned`.

    Args:
        start: Before fine-tuning.
        tuned: After it.
        alpha: Share of `tuned`, from 0 to 1.

    Raises:
        ValueError: If alpha is outside of 0 to 1, or the states are of two architectures.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is outside of 0 to 1: the share of the fine-tuned weights")
    differing = [
        name
        for name in sorted(start.keys() | tuned.keys())
        if name not in start or name not in tuned or start[name].shape != tuned[name].shape
    ]
    if differing:
        raise ValueError(
            f"start and fine-tuned weights differ in {len(differing)} tensors, for example "
            f"{', '.join(differing[:3])}; mix weights of one architecture"
        )
    return {name: _between(start[name], value, alpha) for name, value in tuned.items()}


def _between(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not tuned.is_floating_point():
        return tuned
    return (alpha * tuned.double() + (1 - alpha) * start.double()).to(tuned.dtype)
