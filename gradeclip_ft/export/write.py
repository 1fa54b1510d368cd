"""One export from beginning to end: write aside, read back, compare, put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gradeclip_ft.export.card import card
from gradeclip_ft.export.class_embed import write_class_embed
from gradeclip_ft.export.evaclip import write_evaclip
from gradeclip_ft.export.huggingface import write_huggingface
from gradeclip_ft.export.job import Job, Written, state_of
from gradeclip_ft.export.openclip import code, write_openclip
from gradeclip_ft.export.origin import Origin, facts
from gradeclip_ft.export.staging import NOTE, files_of, staged, write_json
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
