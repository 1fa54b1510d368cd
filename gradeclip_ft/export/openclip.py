"""Weights in the forms that open_clip loads: one file, and beside it a description of the model.

The file goes into `open_clip.create_model(name, pretrained=FILE)`. As safetensors the folder also
goes into `open_clip.create_model("local-dir:FOLDER")`, which needs no registered name.
"""

from __future__ import annotations

from contextlib import chdir, nullcontext
from pathlib import Path

import open_clip
import torch
from torch import nn

from gradeclip_ft.export.job import Job, Written, read_tensors, save_state, write_description
from gradeclip_ft.export.verify import TEXTS, check_embeddings, check_tensors
from gradeclip_ft.models.architecture import pair
from gradeclip_ft.models.clip import ImageTransform, LoadedClip
from gradeclip_ft.models.load import same_pixels
from gradeclip_ft.models.trace import Foreign

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
    usage: list[str] = []
    if registered:
        height, width = job.inputs.pixels.shape[2:]
        again = open_file(loaded.name, file, (height, width))
        difference = check_embeddings(loaded, again, job.inputs, half=job.half)
        usage = [f"model = {by_name(loaded, job.folder / file.name)}"]
        checks.append(f"open_clip by name: loads again, embeddings equal to {difference:.0e}")
    if job.form == "safetensors":
        # open_clip takes parts that the description names relative to the working directory.
        with chdir(stage) if parts else nullcontext():
            place = Path() if parts else stage
            again, preprocess = open_folder(place)
            difference = check_embeddings(loaded, again, job.inputs, half=job.half)
            ours = ImageTransform(pair(job.inputs.pixels.shape[2:]), loaded.preprocessing)
            pixels = same_pixels(ours, preprocess)
            tokenizer = open_clip.get_tokenizer(f"local-dir:{place}")
            tokens = torch.equal(tokenizer(list(TEXTS)), job.inputs.tokens)
        checks.append(
            f"open_clip from the folder: loads again, embeddings equal to {difference:.0e}"
        )
        for what, equal in {"pixels of a photo": pixels, "tokens of a text": tokens}.items():
            checks.append(f"open_clip's {what}: {'equal' if equal else 'others than ours'}")
        usage = _usage("." if parts else str(job.folder), str(job.folder), pixels, tokens)
    return Written(tuple(checks), code("import open_clip", *usage))


def by_name(loaded: LoadedClip, file: Path) -> str | None:
    """How open_clip loads a file of weights without a folder; None where it cannot.

    Its pixels are then those of the name, which need not be those that training began with.
    """
    if not loaded.architecture.registered:
        return None
    own = pair(open_clip.get_model_config(loaded.name)["vision_cfg"].get("image_size", 224))
    size = "" if loaded.image_size == own else f", force_image_size={loaded.image_size}"
    return f'open_clip.create_model("{loaded.name}", pretrained="{file}"{size})'


def _usage(place: str, folder: str, pixels: bool, tokens: bool) -> list[str]:
    """Lines from a photo and two texts to their similarities; what open_clip makes otherwise, ours.

    Args:
        place: Of the folder, for open_clip.
        folder: The same, for us.
        pixels: Whether open_clip makes the pixels that the model was trained on.
        tokens: The same for tokens.
    """
    inside = f"  # from inside {folder}" if place == "." else ""
    ours = f'gradeclip_ft.load("{folder}")'
    return [
        *([] if pixels and tokens else ["import gradeclip_ft"]),
        "from PIL import Image",
        f'folder = "local-dir:{place}"{inside}',
        "model, _, preprocess = open_clip.create_model_and_transforms(folder)",
        *([] if pixels else [f"preprocess = {ours}.transform()  # open_clip's differ"]),
        "tokenizer = open_clip.get_tokenizer(folder)"
        if tokens
        else f"tokenizer = {ours}.tokenizer  # open_clip has none for it",
        "model.eval()",
        'image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)',
        'texts = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)',
        "print(image @ texts.T)",
    ]


def open_file(name: str, file: Path, image_size: tuple[int, int]) -> nn.Module:
    """A registered architecture with the weights of a file, by `open_clip.create_model`."""
    known = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    other = None if image_size == (known, known) else image_size
    model: nn.Module = open_clip.create_model(name, pretrained=str(file), force_image_size=other)
    return model.eval()


def open_folder(folder: Path) -> tuple[nn.Module, Foreign]:
    """A folder with architecture and weights, by open_clip, and what makes its pixels."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess


def code(*lines: str) -> str:
    """A block of Python in Markdown."""
    return "\n".join(["```python", *lines, "```"])
