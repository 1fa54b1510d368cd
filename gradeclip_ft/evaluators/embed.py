"""Unit embeddings of all images, captions and classes of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gradeclip_ft.data.files import ImageSet
from gradeclip_ft.evaluators.base import Track, evaluating, placement
from gradeclip_ft.models.clip import LoadedClip, class_embeddings
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.text.prompts import fill

SENTENCES = 256  # encoded at a time


def encode_pairs(
    loaded: LoadedClip,
    pairs: ImageSet,
    batch_size: int,
    text_batch_size: int,
    workers: int,
    track: Track,
    name: str,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "T D"], Int[Tensor, " T"]]:
    """Unit embeddings of images and of captions, and the image number of each caption."""
    device, dtype = placement(loaded.clip)
    batches = pairs.pairs(
        loaded.transform(train=False), loaded.tokenizer, batch_size=batch_size, workers=workers
    )
    images, tokens, owners, seen = [], [], [], 0
    with evaluating(loaded.clip):
        for batch in track(batches, f"{name}: images", len(batches)):
            images.append(unit(loaded.clip.image.encode(batch.images.to(device, dtype))))
            tokens.append(batch.texts)
            owners.append(batch.owner + seen)
            seen += len(batch.images)
        # Equal captions are encoded once, so that they tie exactly; sorted by length, and cut after
        # the longest of a batch where that is exact.
        width, pad = max(ids.shape[1] for ids in tokens), loaded.tokenizer.pad
        same = [functional.pad(ids, (0, width - ids.shape[1]), value=pad) for ids in tokens]
        distinct, row = torch.unique(torch.cat(same), dim=0, return_inverse=True)
        length = loaded.tokenizer.lengths(distinct)
        order = length.argsort(stable=True)
        parts, found = torch.split(order, text_batch_size), []
        for part in track(parts, f"{name}: captions", len(parts)):
            cut = int(length[part].max()) if loaded.tokenizer.exact_cut else width
            found.append(unit(loaded.clip.text.encode(distinct[part, :cut].to(device))))
    texts = torch.cat(found)[order.argsort().to(device)][row.to(device)]
    return torch.cat(images), texts, torch.cat(owners).to(device)


def encode_classes(
    loaded: LoadedClip,
    names: Sequence[str],
    templates: Sequence[str],
    track: Track,
    name: str,
    *,
    say: Callable[[str, str], str] = fill,
) -> Float[Tensor, "K D"]:
    """Unit class embeddings, some classes at a time, so that progress shows."""
    size = max(1, SENTENCES // max(1, len(templates)))
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return torch.cat(
        [
            class_embeddings(loaded.clip, loaded.tokenizer, part, templates, say=say)
            for part in track(parts, f"{name}: classes", len(parts))
        ]
    )
