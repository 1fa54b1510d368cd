"""An open-vocabulary detector around a frozen CLIP: F-ViT (CLIPSelf, section 4) on torchvision.

Class names are text: any vocabulary can be asked for, with the text tower of the same model. The
detector learns from boxes of base classes. At test time the score of a box joins what the detector
learned with what the frozen model says about the same place; for novel classes the latter decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image

from gradeclip_ft.detection.heads import BoxHead, Images, Proposals, pool_regions, with_owner
from gradeclip_ft.detection.pyramid import STRIDES, Norm, Pyramid, inner_maps
from gradeclip_ft.models.clip import IMAGENET_TEMPLATES, Clip, LoadedClip, class_embeddings
from gradeclip_ft.models.load import RANDOM, load_clip
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.trace import Foreign, UnsupportedTowerError
from gradeclip_ft.models.weights import load_exactly, read_tensors
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.text.prompts import VILD

BACKGROUND = "background"
OWN = "head."
"""Names of tensors that begin so are a detector's, not a CLIP's."""


@dataclass(frozen=True)
class DetectorSettings:
    """How the detector is built and scores; the defaults are F-ViT's for ViT-B/16 on OV-COCO.

    Attributes:
        side: Of the square that images are fitted into, in pixels.
        inner: Blocks whose tokens enter the pyramid, beside the last layer's value path.
        channels: Of the pyramid.
        norm: "batch" or "group", see `norm_layer`.
        region: Side in pixels of boxes that are pooled from the third level.
        templates: "vild" for its 63, "imagenet" for 80, or sentences with `{}` for the class name.
        candidates: Proposals of each level before non-maximum suppression.
        proposals: Of an image afterwards.
        anchor_samples: Anchors of an image that the proposal network learns from.
        base_share: Exponent of the frozen model's probability, for base classes and background.
        novel_share: The same for novel classes.
        scale: From the frozen model's cosine to its logit.
        least_score: Boxes that score less are left out.
        overlap: Boxes of one class that overlap a better one by more (IoU) are left out.
        boxes: Most boxes of an image.
    """

    side: int = 640
    inner: Sequence[int] = (3, 5, 7)
    channels: int = 256
    norm: Norm = "batch"
    region: float = 224.0
    templates: str | Sequence[str] = "vild"
    candidates: int = 2000
    proposals: int = 1000
    anchor_samples: int = 256
    base_share: float = 0.1
    novel_share: float = 0.8
    scale: float = 75.0
    least_score: float = 0.01
    overlap: float = 0.4
    boxes: int = 100

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates themselves.

        Raises:
            ValueError: An unknown name, or a sentence without a place for the class name.
        """
        named = {"vild": VILD, "imagenet": tuple(IMAGENET_TEMPLATES)}
        if isinstance(self.templates, str) and self.templates not in named:
            raise ValueError(
                f"templates={self.templates!r}: write vild, imagenet or a list of sentences"
            )
        found = named[self.templates] if isinstance(self.templates, str) else (*self.templates,)
        if not found or any("{}" not in sentence for sentence in found):
            raise ValueError(f"templates={self.templates!r}: each needs {{}} for the class name")
        return found


@dataclass(frozen=True)
class Vocabulary:
    """Classes to be found.

    Attributes:
        names: Of the classes.
        is_base: Which of them the detector learned from.
        embeddings: Unit text embeddings of the classes, then that of "background".
    """

    names: tuple[str, ...]
    is_base: Bool[Tensor, " K"]
    embeddings: Float[Tensor, "J D"]

    def to(self, device: torch.device) -> Vocabulary:
        """The same on another device."""
        return replace(self, is_base=self.is_base.to(device), embeddings=self.embeddings.to(device))


@dataclass(frozen=True)
class Detections:
    """Boxes found in one image, best first.

    Attributes:
        boxes: xyxy in pixels of the square.
        scores: From 0 to 1.
        labels: Place in the vocabulary.
    """

    boxes: Float[Tensor, "R 4"]
    scores: Float[Tensor, " R"]
    labels: Int[Tensor, " R"]


class Detector(nn.Module):
    """A frozen CLIP with a pyramid, a proposal network and a box head that learn.

    It can be used wherever a model of images and texts can be evaluated or explained: its towers
    are those of the CLIP.

    Args:
        clip: Is frozen and stays in evaluation mode.
        tokenizer: Of that model.
        settings: How it is built and scores.

    Raises:
        UnsupportedTowerError: The image tower has no tokens of inner layers.
        ValueError: The side is not an even number of patches.
    """

    def __init__(self, clip: Clip, tokenizer: Tokenizer, settings: DetectorSettings) -> None:
        super().__init__()
        tower = clip.image
        if tower.unexplained is not None:
            raise UnsupportedTowerError(
                f"{tower.unexplained}: no dense features, so no detector can be built on it; "
                "choose a ViT, EVA02-B-16 for example"
            )
        patch, side = tower.patch, settings.side
        if side < 4 * patch or side % (2 * patch):
            near = max(2, round(side / (2 * patch))) * 2 * patch
            raise ValueError(
                f"the detector's side is {side} pixels, expected an even number of patches of "
                f"{patch}, at least 4; use {near}"
            )
        self.image, self.text = tower, clip.text
        self.settings = settings
        self.tokenizer = tokenizer
        self.clip = clip.requires_grad_(False).eval()
        with torch.no_grad():  # shows at once whether the tower has such blocks, and their width
            blank = torch.zeros(1, 3, 4 * patch, 4 * patch, device=clip.device)
            maps, dense = inner_maps(tower, blank, settings.inner)
        if len(maps) != 4:
            raise ValueError(f"inner={list(settings.inner)}: give three blocks")
        self.strides = [patch * factor for factor in STRIDES]
        self.pyramid = Pyramid([each.shape[1] for each in maps], settings.channels, settings.norm)
        self.proposals = Proposals(
            settings.channels,
            self.strides,
            candidates=settings.candidates,
            kept=settings.proposals,
            samples=settings.anchor_samples,
        )
        self.head = BoxHead(settings.channels, dense.shape[-1], settings.norm)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    @property
    def model(self) -> Foreign:
        """All of it, whose state dict is what a run saves."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.clip.device

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the CLIP's inverse temperature."""
        return self.clip.log_scale

    def train(self, mode: bool = True) -> Detector:
        """Training mode of what learns; the CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def vocabulary(self, names: Sequence[str], base: Sequence[str]) -> Vocabulary:
        """Classes with their text embeddings.

        Args:
            names: All classes.
            base: Those that boxes were annotated for in training; others may be among them.

        Raises:
            ValueError: A name is empty, given twice, or "background".
        """
        twice = [name for name, count in Counter(names).items() if count > 1]
        wrong = [name for name in names if not name.strip() or name == BACKGROUND]
        if not names or twice or wrong:
            raise ValueError(
                f"the vocabulary {list(names)} must be different names, without {BACKGROUND}"
                + (f"; given twice: {', '.join(twice)}" if twice else "")
            )
        embeddings = class_embeddings(
            self.clip, self.tokenizer, [*names, BACKGROUND], self.settings.sentences
        )
        is_base = torch.tensor([name in set(base) for name in names], device=self.device)
        return Vocabulary(tuple(names), is_base, embeddings)

    def features(
        self, images: Float[Tensor, "B 3 S S"]
    ) -> tuple[list[Tensor], Float[Tensor, "B h w D"]]:
        """Levels of the pyramid, and the dense features of the frozen model."""
        with torch.no_grad():
            maps, dense = inner_maps(self.clip.image, images, self.settings.inner)
        return self.pyramid(maps), dense

    def propose(
        self,
        images: Float[Tensor, "B 3 S S"],
        sizes: Int[Tensor, "B 2"],
        levels: Sequence[Tensor],
        targets: Any = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of every image and, in training mode with targets, the losses."""
        named = {str(number): level for number, level in enumerate(levels)}
        found: tuple[list[Tensor], dict[str, Tensor]] = self.proposals(
            Images(images, sizes), named, targets
        )
        return found

    def classify(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor], vocabulary: Vocabulary
    ) -> tuple[Float[Tensor, "R J"], Float[Tensor, "R 4"]]:
        """Logits over classes and background, and box deltas, of boxes per image."""
        region = self.settings.region
        pooled = pool_regions(levels[:4], self.strides[:4], boxes, region=region)
        logits, deltas = self.head(pooled, vocabulary.embeddings)
        return logits, deltas

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "B 3 S S"],
        sizes: Int[Tensor, "B 2"],
        vocabulary: Vocabulary,
    ) -> list[Detections]:
        """Boxes of the classes of a vocabulary, in every image.

        Args:
            images: Normalised pixels of squares.
            sizes: (height, width) of their contents.
            vocabulary: What to look for.
        """
        levels, dense = self.features(images)
        proposals, _ = self.propose(images, sizes, levels)
        logits, deltas = self.classify(levels, proposals, vocabulary)
        rois = with_owner(proposals)
        own = self.frozen_logits(dense, rois, images.shape[-1], vocabulary)
        scores = fuse(logits.softmax(1), own.softmax(1), vocabulary.is_base, self.settings)
        boxes = self.coder.decode_single(deltas, rois[:, 1:])
        counts = [len(each) for each in proposals]
        parts = zip(
            torch.split(boxes, counts), torch.split(scores, counts), sizes.tolist(), strict=True
        )
        return [
            best_boxes(clip_boxes_to_image(each, size), score[:, :-1], self.settings)
            for each, score, size in parts
        ]

    def frozen_logits(
        self,
        dense: Float[Tensor, "B h w D"],
        rois: Float[Tensor, "R 5"],
        side: int,
        vocabulary: Vocabulary,
    ) -> Float[Tensor, "R J"]:
        """What the frozen model says about proposals: scaled cosines of their dense features."""
        pooled = pool_boxes(dense, rois[:, 1:] / side, rois[:, 0].long())
        return self.settings.scale * pooled @ vocabulary.embeddings.T


def fuse(
    learned: Float[Tensor, "R J"],
    frozen: Float[Tensor, "R J"],
    is_base: Bool[Tensor, " K"],
    settings: DetectorSettings,
) -> Float[Tensor, "R J"]:
    """Geometric mean p^(1-a) · q^a of two probabilities; a is another one for novel classes.

    Args:
        learned: p, of the detector; the last column is background.
        frozen: q, of the frozen model.
        is_base: Which classes the detector learned from.
        settings: Hold both exponents.
    """
    share = torch.full_like(learned[0], settings.base_share)
    share[:-1][~is_base] = settings.novel_share
    return learned ** (1 - share) * frozen**share


def best_boxes(
    boxes: Float[Tensor, "R 4"], scores: Float[Tensor, "R K"], settings: DetectorSettings
) -> Detections:
    """Boxes that score enough, without those that overlap a better one of their class."""
    row, label = (scores > settings.least_score).nonzero().unbind(1)
    found, score = boxes[row], scores[row, label]
    keep = batched_nms(found, score, label, settings.overlap)[: settings.boxes]
    return Detections(found[keep], score[keep], label[keep])


def load_detector(
    name: str, weights: str | Path | None = None, *, settings: DetectorSettings | None = None
) -> LoadedClip:
    """A detector on a CLIP, with tokenizer and preprocessing of the CLIP.

    Args:
        name: Of the CLIP, as in `load_clip`.
        weights: Of a detector, or of the CLIP alone, as in `load_clip`; the rest then starts at
            random.
        settings: How it is built and scores; F-ViT's unless given.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The weights do not fit, or no detector can be built on this model.
    """
    how = settings or DetectorSettings()
    state = read_tensors(weights) if weights is not None and Path(weights).is_file() else {}
    whole = any(key.startswith(OWN) for key in state)
    loaded = load_clip(name, RANDOM if whole else weights)
    detector = Detector(loaded.require_clip("the backbone of a detector"), loaded.tokenizer, how)
    if whole:
        load_exactly(detector, state, str(weights))
        loaded = replace(loaded, weights=str(weights))
    return replace(loaded, clip=detector.eval())
