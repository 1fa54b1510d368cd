"""Weights in the forms that open_clip loads: one file, and beside it a description of the model.

The file goes into `open_clip.create_model(name, pretrained=FILE)`. As safetensors the folder also
goes into `open_clip.create_model("local-dir:FOLDER")`, which needs no registered name.
"""

from __future__ import annotations

from contextlib import chdir, nullcontext
from pathlib import Path

import open_clip
from torch import nn

from gradeclip_ft.export.job import Job, Written, read_tensors, save_state, write_description
from gradeclip_ft.export.verify import check_embeddings, check_tensors

FORMS = ("safetensors", "pt")


def write_openclip(job: Job, stage: Path) -> Written:
    """Weights and description; read back by `open_clip.create_model`.

    Raises:
        ValueError: The form is unknown, or not for an architecture without a registered name.
        ExportError: Read back, it is another model.
    """
    loaded = job.loaded
    if job.form not in FORMS:
        raise ValueError(f"format={job.form} is unknown; use {' or '.join(FORMS)}")
    registered = loaded.architecture.registered
    if job.form != "safetensors" and not registered:
        raise ValueError(
            f"open_clip does not know the architecture {loaded.name}, so its export is a folder "
            "with a description, whose weights are safetensors; use format=safetensors"
        )
    parts = write_description(loaded, stage)
    file = stage / f"open_clip_model.{job.form}"
    save_state(job.state, file, job.facts)
    check_tensors(job.state, read_tensors(file), file.name)
    checks = [f"{file.name}: {len(job.state)} tensors read back bit-equal"]
    calls = []
    if registered:
        height, width = job.inputs.pixels.shape[2:]
        again = open_file(loaded.name, file, (height, width))
        difference = check_embeddings(loaded, again, job.inputs, half=job.half)
        calls.append(
            f'open_clip.create_model("{loaded.name}", pretrained="{job.folder / file.name}")'
        )
        checks.append(f"open_clip by name: loads again, embeddings equal to {difference:.0e}")
    if job.form == "safetensors":
        # open_clip takes parts that the description names relative to the working directory.
        with chdir(stage) if parts else nullcontext():
            again = open_folder(Path() if parts else stage)
        difference = check_embeddings(loaded, again, job.inputs, half=job.half)
        place, where = (".", f"  # from inside {job.folder}") if parts else (job.folder, "")
        calls.append(f'open_clip.create_model_and_transforms("local-dir:{place}"){where}')
        checks.append(
            f"open_clip from the folder: loads again, embeddings equal to {difference:.0e}"
        )
    return Written(tuple(checks), code("import open_clip", *calls))


def open_file(name: str, file: Path, image_size: tuple[int, int]) -> nn.Module:
    """A registered architecture with the weights of a file, by `open_clip.create_model`."""
    known = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    other = None if image_size == (known, known) else image_size
    model: nn.Module = open_clip.create_model(name, pretrained=str(file), force_image_size=other)
    return model.eval()


def open_folder(folder: Path) -> nn.Module:
    """A folder with architecture and weights, by `open_clip.create_model`."""
    model: nn.Module = open_clip.create_model(f"local-dir:{folder}")
    return model.eval()


def code(*lines: str) -> str:
    """A block of Python in Markdown."""
    return "\n".join(["```python", *lines, "```"])
