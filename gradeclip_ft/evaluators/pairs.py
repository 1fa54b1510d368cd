"""Evaluators of images and captions: retrieval, and the choice between two captions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import torch

from gradeclip_ft.data.files import ImageSet, Source
from gradeclip_ft.evaluators.base import Track, untracked
from gradeclip_ft.evaluators.embed import encode_pairs
from gradeclip_ft.metrics import recall, require_finite, search
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.record import Json, Measured, as_text, data_fingerprint

TOPK = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalEvaluator:
    """Recall at 1, 5 and 10, text to image and image to text."""

    name: str
    data: Source[ImageSet]
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "retrieval",
            "recall": "at least one right answer among the first k, first index wins ties",
            "image": "the model's own preprocessing",
            "text": "plain caption, no prompt",
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        pairs = self.data()
        images, texts, owner = encode_pairs(
            loaded, pairs, self.batch_size, self.text_batch_size, self.workers, track, self.name
        )
        number = torch.arange(len(images), device=images.device)
        found = {
            "image_retrieval": search(texts, images, owner, number),
            "text_retrieval": search(images, texts, number, owner),
        }
        height, width = loaded.image_size
        return Measured(
            metrics={
                f"{way}_recall@{k}": value
                for way, (ranks, _) in found.items()
                for k, value in recall(ranks, TOPK).items()
            },
            protocol={
                **self.protocol,
                "image_size": height if height == width else [height, width],
                "context_length": loaded.tokenizer.context_length,
            },
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "share_of_ties": {
                    way: float(ties.double().mean()) for way, (_, ties) in found.items()
                },
                "samples": {
                    way: {"image": as_text(image), "rank": as_text(found[way][0])}
                    for way, image in (("image_retrieval", owner), ("text_retrieval", number))
                },
                "images_by_number_of_captions": {
                    str(number): images
                    for number, images in sorted(Counter(map(len, pairs.captions)).items())
                },
            },
        )


@dataclass(frozen=True)
class ChoiceEvaluator:
    """Share of images whose right caption is nearer than the wrong one, by kind.

    The captions of the data are right and wrong in turn.
    """

    name: str
    data: Source[ImageSet]
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "choice of two captions",
            "right": "cosine above that of the wrong caption; equal counts as wrong",
            "image": "the model's own preprocessing",
            "text": "plain caption, no prompt",
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        pairs = self.data()
        images, texts, owner = encode_pairs(
            loaded, pairs, self.batch_size, self.text_batch_size, self.workers, track, self.name
        )
        scores = (images[owner] * texts).sum(1).view(-1, 2).cpu()
        require_finite(scores)
        right = (scores[:, 0] > scores[:, 1]).tolist()
        asked = Counter(pairs.kinds)
        answered = Counter(kind for kind, hit in zip(pairs.kinds, right, strict=True) if hit)
        by_kind = {kind: answered[kind] / asked[kind] for kind in sorted(asked)}
        return Measured(
            metrics={"mean": fmean(by_kind.values()), **by_kind},
            protocol={
                **self.protocol,
                "image_size": list(loaded.image_size),
                "context_length": loaded.tokenizer.context_length,
            },
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "asked": dict(sorted(asked.items())),
                "share_of_ties": float((scores[:, 0] == scores[:, 1]).double().mean()),
            },
        )
