"""EVA models as F-ViT and CLIPSelf load them: backbone and text vectors of one fine-tuned model.

F-ViT skips unknown names without a word, so the backbone would stay random: nothing is written
whose names are not exactly EVA-CLIP's, and timm's reader of such files finds the same trunk.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from open_clip.timm_model import TimmModel
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from gradeclip_ft.export.class_embed import write_class_embed
from gradeclip_ft.export.fvit import DETECTORS, OTHER, usage
from gradeclip_ft.export.job import Job, Written
from gradeclip_ft.export.openclip import read_tensors
from gradeclip_ft.export.staging import save_state
from gradeclip_ft.export.verify import check_embeddings, check_tensors
from gradeclip_ft.models.evaclip import OURS, THEIRS, from_evaclip, name_table, to_evaclip


def write_evaclip(job: Job, stage: Path) -> Written:
    """Backbone and class vectors; the names are compared with EVA-CLIP's complete list.

    Args:
        job: What to write.
        stage: Folder to write into.

    Raises:
        ValueError: The model is no EVA, or a key of it is not known; the message names it.
        ExportError: Read back, it is another model.
    """
    trunk = _trunk(job)
    detector = DETECTORS.get(job.loaded.name)
    file = stage / (detector.file if detector else OTHER)
    save_state(to_evaclip(job.state), file)
    again = check_evaclip(job, file, trunk)
    model = deepcopy(job.loaded.clip.model)
    model.load_state_dict(again, strict=True)
    difference = check_embeddings(job.loaded, model, job.inputs, half=job.half)
    vectors = write_class_embed(job.loaded, stage)
    visual = sum(key.startswith(OURS) for key in again)
    checks = (
        f"{file.name}: {len(again)} tensors, {visual} of them visual, names complete",
        f"timm's reader of EVA-CLIP files: trunk bit-equal, embeddings equal to {difference:.0e}",
        f"{vectors.name}: 80 classes and background, unit vectors read back bit-equal",
    )
    return Written(checks, usage(job.folder, detector, file.name, vectors.name))


def check_evaclip(job: Job, file: Path, trunk: Eva) -> dict[str, Tensor]:
    """Read the file as timm and as this package do.

    Args:
        job: What was written.
        file: Under EVA-CLIP's names.
        trunk: timm's module, which says what its reader must find.

    Returns:
        The tensors under open_clip's names, the trunk through timm's reader.

    Raises:
        ExportError: A name is missing or unknown, or a tensor differs; the message names it.
    """
    stored = read_tensors(file)
    expected = name_table(job.state, OURS)
    check_tensors({theirs: job.state[ours] for ours, theirs in expected.items()}, stored, file.name)
    by_timm = {f"{OURS}{key}": value for key, value in checkpoint_filter_fn(stored, trunk).items()}
    rest = {key: value for key, value in stored.items() if not key.startswith(THEIRS)}
    check_tensors(job.state, {**by_timm, **rest}, f"{file.name} by timm's reader")
    check_tensors(job.state, from_evaclip(stored), f"{file.name} by gradeclip_ft's reader")
    return {**by_timm, **rest}


def _trunk(job: Job) -> Eva:
    visual = job.loaded.clip.model.visual
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, Eva):
        raise ValueError(
            f"to=[evaclip] takes EVA models, {job.loaded.name} has a {type(trunk).__name__}; use "
            "to=[openclip] or to=[huggingface]"
        )
    return trunk
