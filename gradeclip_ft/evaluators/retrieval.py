"""Retrieval between images and captions, recall@k both ways (Grad-ECLIP, Table 9).

`image_retrieval_recall@k` is text to image, `text_retrieval_recall@k` image to text, as in
LAION's CLIP_benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradeclip_ft.evaluators.base import Track, evaluating, untracked
from gradeclip_ft.evaluators.embed import encode_images, encode_texts
from gradeclip_ft.evaluators.pair_source import PairSource
from gradeclip_ft.metrics.retrieval import recall, search
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.fingerprint import data_fingerprint
from gradeclip_ft.results.record import Json, Measured

TOPK = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalEvaluator:
    """Recall at 1, 5 and 10, text to image and image to text.

    Attributes:
        name: Of the result file; names the split.
        data: Where pairs come from.
        batch_size: Images per forward pass; does not change the numbers.
        text_batch_size: Captions per forward pass; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: PairSource
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

    def prepare(self) -> None:
        """Make or check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: The data are damaged, or the embeddings are not finite.
        """
        pairs = self.data(transform=loaded.transform(train=False), tokenizer=loaded.tokenizer)
        batches = pairs.batches(self.batch_size, self.workers)
        with evaluating(loaded.clip):
            shown = track(batches, f"{self.name}: images", len(batches))
            images, tokens, owner = encode_images(loaded, shown)
            texts = encode_texts(loaded, tokens, self.text_batch_size, track, self.name)
        number = torch.arange(len(images), device=images.device)
        owner = owner.to(images.device)
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
                "images_by_number_of_captions": {
                    str(count): int(images_with)
                    for count, images_with in enumerate(torch.bincount(torch.bincount(owner)))
                    if images_with
                },
            },
        )
