"""Fine-grained recognition of boxes: the right text of each against wrong ones (FG-OVD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradeclip_ft.data.box_texts import BoxTextImages
from gradeclip_ft.data.files import Source
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.evaluators.regions import square_side
from gradeclip_ft.metrics import label_ranks
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.results.record import Json, Measured, data_fingerprint
from gradeclip_ft.text.prompts import phrase_prompt


@dataclass(frozen=True)
class BoxTextEvaluator:
    """Share of boxes whose right text is nearest to their feature, by part and over all.

    Bianchi et al., "The devil is in the fine-grained details" (FG-OVD), without its detector: the
    feature is RoIAlign's of the dense features, as FG-CLIP measures. Of equal texts the right one,
    which is the first, counts, as in its program.

    Attributes:
        image_size: Side in pixels that both sides of a photo are brought to; None for the model's.
        dense: What patches attend to in the last layer.
    """

    name: str
    data: Source[BoxTextImages]
    image_size: int | None = None
    dense: DensePath = "value"
    batch_size: int = 32
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "texts of boxes",
            "box_pooling": "RoIAlign 1x1, sampling_ratio -1, aligned",
            "dense": self.dense,
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        side = square_side(loaded, self.image_size, self.name)
        images = self.data()
        device, dtype = placement(loaded.clip)
        boxes = [one for some in images.boxes for one in some]
        place = {text: row for row, text in enumerate({t: None for b in boxes for t in b.texts})}
        batches = images.batches(
            side, loaded.mean, loaded.std, batch_size=self.batch_size, workers=self.workers
        )
        right: dict[str, list[bool]] = {}
        with evaluating(loaded.clip):
            texts = encode_classes(loaded, list(place), ["{}"], track, self.name, say=phrase_prompt)
            left = iter(boxes)
            for pixels, corners, owner in track(batches, f"{self.name}: images", len(batches)):
                dense = loaded.clip.image.trace(pixels.to(device, dtype)).dense(self.dense)
                features = pool_boxes(dense, corners.to(device), owner.to(device))
                for feature, box in zip(features, left, strict=False):
                    # Row by row: a product of matrices may round equal texts differently.
                    scores = (texts[[place[text] for text in box.texts]] * feature).sum(1)
                    first = label_ranks(scores[None].cpu(), torch.tensor([0]))
                    right.setdefault(box.part, []).append(bool(first == 0))
        every = [hit for hits in right.values() for hit in hits]
        return Measured(
            metrics={
                **{f"{part}/top1": sum(hits) / len(hits) for part, hits in right.items()},
                "all/top1": sum(every) / len(every),
            },
            protocol={**self.protocol, "image_size": side},
            data=data_fingerprint(images.files, images.images, images.counts),
            details={"boxes": {part: len(hits) for part, hits in right.items()}},
        )
