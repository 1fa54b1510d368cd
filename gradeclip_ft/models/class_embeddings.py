"""Class names in prompt templates to one embedding per class, by the text tower under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.text.prompts import fill


@torch.no_grad()
def class_embeddings(
    clip: Clip,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    say: Callable[[str, str], str] = fill,
    batch_size: int = 256,
) -> Float[Tensor, "K D"]:
    """Unit class embeddings in fp32: embed, normalise, mean over templates, normalise.

    Args:
        clip: The model; the mode of its layers is the caller's business.
        tokenizer: Of that model.
        names: Class names as the annotation file has them.
        templates: Sentences with `{}` for the name and `{a}` for its article.
        say: Template and name to sentence; ViLD's rules unless told otherwise.
        batch_size: Sentences encoded at a time; bounds memory, not the result.

    Raises:
        ValueError: No name or no template.
    """
    if not names or not templates:
        raise ValueError(f"got {len(names)} names and {len(templates)} templates, expected some")
    device = clip.log_scale.device
    sentences = [say(template, name) for name in names for template in templates]
    parts = [
        unit(
            clip.text.encode(tokenizer(sentences[start : start + batch_size], trim=True).to(device))
        )
        for start in range(0, len(sentences), batch_size)
    ]
    by_class = torch.cat(parts).view(len(names), len(templates), -1)  # (K, T, D)
    return unit(by_class.mean(1))
