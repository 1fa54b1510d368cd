"""What is trained, by which optimiser, on which schedule.

The paper states AdamW, learning rate 1e-5 and weight decay 0.1; warm-up, cosine and the tensors
without decay are ours (the settings of CLIPSelf).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

TEMPERATURE = ("logit_scale", "logit_bias")
UNUSED = ("logit_bias", "text_decoder.")  # SigLIP's bias, CoCa's captioner: no loss here reads them
BLOCK = re.compile(r"\b(?:resblocks|blocks)\.(\d+)\.")
TAIL = re.compile(
    r"^visual\.(?:ln_post|proj\b|head|attnpool|attn_pool|trunk\.(?:norm|fc_norm|head|attn_pool))"
)


def freeze(
    model: nn.Module,
    *,
    train_image: bool = True,
    train_text: bool = True,
    train_temperature: bool = True,
    image_blocks: int | None = None,
) -> None:
    """Set `requires_grad` of an open_clip model's parameters; the options are FineTuneModule's.

    `visual.*` is the image tower, `logit_*` the temperature, the rest the text tower.

    Raises:
        ValueError: If the tower has fewer blocks than asked for, or nothing is left to train.
    """
    kept = _image_names(model, image_blocks) if train_image else set()
    for name, parameter in model.named_parameters():
        if name.startswith(UNUSED):
            parameter.requires_grad = False
        elif name.startswith("visual."):
            parameter.requires_grad = name in kept
        elif name.split(".")[-1] in TEMPERATURE:
            parameter.requires_grad = train_temperature
        else:
            parameter.requires_grad = train_text
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "every part is frozen, nothing to train; set train_image or train_text to true"
        )


def _image_names(model: nn.Module, blocks: int | None) -> set[str]:
    """Names of the image tower's parameters that learn."""
    names = [name for name, _ in model.named_parameters() if name.startswith("visual.")]
    if blocks is None:
        return set(names)
    index = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    depth = max(index.values(), default=-1) + 1
    if not 0 <= blocks <= depth:
        raise ValueError(
            f"image_blocks is {blocks} of {depth} blocks; use 0 to {depth}, or null for all"
        )
    last = {name for name, block in index.items() if block >= depth - blocks}
    return last | {name for name in names if TAIL.match(name)}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and not (vectors, norms, temperature)."""
    decayed: list[tuple[str, nn.Parameter]] = []
    exempt: list[tuple[str, nn.Parameter]] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            whole = parameter.ndim >= 2 and name.split(".")[-1] not in TEMPERATURE
            (decayed if whole else exempt).append((name, parameter))
    groups = [("decay", weight_decay, decayed), ("no_decay", 0.0, exempt)]
    return [
        {"name": name, "weight_decay": decay, "params": [parameter for _, parameter in members]}
        for name, decay, members in groups
        if members
    ]


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float = 1e-5,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.98),
    eps: float = 1e-6,
    extra: Mapping[str, Any] | None = None,
) -> Optimizer:
    """AdamW over the trainable ones of the named parameters; `extra` goes to torch as it is."""
    first, second = betas
    groups = parameter_groups(parameters, weight_decay=weight_decay)
    return AdamW(groups, lr=lr, betas=(first, second), eps=eps, **(extra or {}))


def warmup_constant(optimizer: Optimizer, *, warmup: int) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then the full rate to the end, as F-ViT trains."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))


def warmup_cosine(
    optimizer: Optimizer, *, steps: int, warmup: int | None = None, final: float = 0.0
) -> LambdaLR:
    """Linear warm-up over `warmup` steps, then half a cosine down to `final` times the rate.

    Without a number, the warm-up takes a tenth of the steps, at most 1,000.

    Raises:
        ValueError: If the warm-up is as long as the training.
    """
    if warmup is None:
        warmup = min(1000, steps // 10)
    if not 0 <= warmup < steps:
        raise ValueError(
            f"the warm-up takes {warmup} of {steps} steps; set optim.schedule.warmup below that"
        )

    def factor(step: int) -> float:
        """Share of the full learning rate that step `step`, counted from 0, uses."""
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / (steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
