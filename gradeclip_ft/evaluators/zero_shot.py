"""Zero-shot classification of whole images: top-1 and top-5 by the cosine with class embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradeclip_ft.data.files import ImageSet, Source
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.metrics import ClassMeanAccuracy
from gradeclip_ft.models.clip import IMAGENET_NAMES, IMAGENET_TEMPLATES, LoadedClip
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import phrase_prompt

TOPK = (1, 5)


@dataclass(frozen=True)
class ZeroShotEvaluator:
    """Top-1 and top-5 over all images, and as mean over classes.

    Attributes:
        class_names: "imagenet" for open_clip's 1,000, "data" for those of the data, or a list.
        templates: "imagenet" for its 80, "data" for those of the data, or sentences with `{}`.
    """

    name: str
    data: Source[ImageSet]
    class_names: Literal["imagenet", "data"] | Sequence[str] = "imagenet"
    templates: Literal["imagenet", "data"] | Sequence[str] = "imagenet"
    batch_size: int = 64
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model or the data."""
        return {
            "task": "zero-shot classification",
            "image": "the model's own preprocessing",
            **texts_protocol(self.class_names, self.templates),
            "accuracy": "top1 over all images, mean_top1 over classes present",
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        images = self.data()
        names = names_of(images, self.class_names, self.name)
        templates = templates_of(images, self.templates, self.name)
        meter = ClassMeanAccuracy(len(names), TOPK)
        batches = images.labelled(
            loaded.transform(train=False), batch_size=self.batch_size, workers=self.workers
        )
        device, dtype = placement(loaded.clip)
        with evaluating(loaded.clip):
            classes = encode_classes(loaded, names, templates, track, self.name, say=phrase_prompt)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                found = unit(loaded.clip.image.encode(batch.images.to(device, dtype)))
                meter.update((found @ classes.T).cpu(), batch.labels)
        means = {f"mean_{key}": value for key, value in meter.mean().items()}
        return Measured(
            metrics={**meter.micro(), **means},
            protocol={
                **self.protocol,
                "image_size": list(loaded.image_size),
                "classes": len(names),
                "class_list_hash": hash_json(names),
                "templates_hash": hash_json(templates),
            },
            data=data_fingerprint(images.files, images.listed, images.counts),
            details={
                "share_of_ties": meter.share_of_ties,
                "by_class": meter.by_class(names),
                "most_confused": meter.most_confused(names),
            },
        )


def texts_protocol(names: str | Sequence[str], templates: str | Sequence[str]) -> dict[str, Json]:
    """What is known of class names and templates without the data: one's own by their hash."""
    told: dict[str, Json] = {}
    for key, texts, code in (
        ("class_names", names, "class_list_hash"),
        ("templates", templates, "templates_hash"),
    ):
        told |= {key: texts} if isinstance(texts, str) else {key: "own", code: hash_json([*texts])}
    return told


def names_of(
    images: ImageSet, wanted: Literal["imagenet", "data"] | Sequence[str], evaluator: str
) -> list[str]:
    """Class names: ImageNet's, those of the data, or a list; one for each class of the data."""
    _require_known("class_names", wanted, evaluator)
    known = {"imagenet": IMAGENET_NAMES, "data": images.classes}
    found = known[wanted] if isinstance(wanted, str) else wanted
    if len(found) != len(images.classes):
        raise ValueError(
            f"{evaluator}: {len(found)} class names for {len(images.classes)} classes of the "
            "data; set class_names=data, or a list in the order of the labels"
        )
    return list(found)


def templates_of(
    images: ImageSet, wanted: Literal["imagenet", "data"] | Sequence[str], evaluator: str
) -> list[str]:
    """Templates: ImageNet's, those of the data, or a list."""
    _require_known("templates", wanted, evaluator)
    if wanted == "imagenet":
        return IMAGENET_TEMPLATES
    if wanted == "data" and not images.templates:
        raise ValueError(f"{evaluator}: the data bring no templates; set templates=imagenet")
    return list(images.templates if wanted == "data" else wanted)


def _require_known(option: str, wanted: str | Sequence[str], evaluator: str) -> None:
    if isinstance(wanted, str) and wanted not in ("imagenet", "data"):
        raise ValueError(
            f"{evaluator}: {option}={wanted}, expected imagenet, data or a list; write a list in "
            f"brackets, {option}=['{wanted}']"
        )
