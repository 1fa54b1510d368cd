"""Start and fine-tuned weights mixed: alpha · tuned + (1 - alpha) · start.

CLIPSelf does so to keep what the start weights can do (0.7 for B/16, 0.95 for L/14).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
