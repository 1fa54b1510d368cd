"""What every format is made from, and what each hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradeclip_ft.export.verify import SHOWN, Inputs
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.record import Json


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        loaded: The model, in fp32.
        state: The tensors to write under open_clip's names, rounded if asked for.
        facts: See `origin.facts`.
        inputs: Shown to the model and to its export.
        folder: Where the files will stand; formats write into another folder first.
        form: "safetensors" or "pt", for formats that have both.
    """

    loaded: LoadedClip
    state: Mapping[str, Tensor]
    facts: Mapping[str, Json]
    inputs: Inputs
    folder: Path
    form: str = "safetensors"

    @property
    def half(self) -> bool:
        """Whether the tensors were rounded to fp16."""
        return self.facts["precision"] == "float16"


@dataclass(frozen=True)
class Written:
    """One format, written and checked.

    Attributes:
        checks: What was compared, with figures, one sentence each.
        usage: How others load it, as Markdown.
    """

    checks: tuple[str, ...]
    usage: str


def state_of(loaded: LoadedClip, *, half: bool) -> dict[str, Tensor]:
    """The model's tensors as they are written: on the CPU, contiguous, finite.

    Raises:
        ValueError: A tensor has NaN or infinite values, or values that fp16 cannot hold.
    """
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in loaded.clip.model.state_dict().items()
    }
    if broken := _not_finite(state):
        raise ValueError(
            f"weights are not finite in {len(broken)} tensors ({', '.join(broken[:SHOWN])}); the "
            "training diverged, export an earlier run"
        )
    if not half:
        return state
    rounded = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    if broken := _not_finite(rounded):
        raise ValueError(
            f"values beyond 65504, which fp16 cannot hold, in {', '.join(broken[:SHOWN])}; export "
            "with half=false"
        )
    return rounded


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    return [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
