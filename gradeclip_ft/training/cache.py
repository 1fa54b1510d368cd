"""What frozen parts compute, kept on disk: a step then costs only what learns.

With the first blocks and the text tower frozen, the tokens that enter the first block that learns
and the embeddings of texts are the same at every visit and in every run. So are the maps of a start
model and its embeddings of images, whatever learns. They are stored in single files by content
(pixels, token ids) below a folder that is named by the model, its weights and the precision of the
step they come from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import Explainer, RecordExplainer, TraceExplainer, settings_of
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import Pass
from gradeclip_ft.training.optim import BLOCK


class FrozenCache:
    """Serves a model, and teachers that share its frozen parts.

    Folders are named at their first use: a run that is resumed gets its weights, also those of the
    start model, from the checkpoint, after the cache is made.

    Args:
        clip: The model, with `requires_grad` set.
        folder: Grows by 4 bytes for every number of a token: 0.4 MB for an image of 257 tokens
            with 384 channels; and for every cell of a map and channel of an embedding.
        start: The start model, if its maps or embeddings of images will be asked for.

    Raises:
        ValueError: No block of the image tower is frozen, or its patches learn, and there is no
            start model.
    """

    def __init__(self, clip: Clip, folder: str | Path, *, start: Clip | None = None) -> None:
        learning = {n for n, value in clip.model.named_parameters() if value.requires_grad}
        self._clip, self._learning, self._start, self._root = clip, learning, start, Path(folder)
        image = [name for name in learning if name.startswith("visual.")]
        blocks = [int(found[1]) for name in image if (found := BLOCK.search(name))]
        self._depth = clip.image.depth
        self.first = min(blocks, default=self._depth - 1)
        if not self.first and start is None:
            raise ValueError(
                "a cache keeps what frozen blocks compute, and maps and embeddings of the start "
                "model, not its crops or patches; set optim.image_blocks, "
                "objective.maps_from=start, or the term keep, or mosaic with target=start"
            )
        self._texts = not any(not n.startswith(("visual.", "logit_")) for n in learning)
        self._pad = clip.text.pad
        self._watched: Tensor | None = None
        self._keys: list[str] = []
        self._tokens: dict[str, Tensor] = {}  # by precision: a teacher's may be another

    @cached_property
    def _frozen_folder(self) -> Path:
        return self._root / _name_of(self._clip, without=self._learning)

    @cached_property
    def _start_folder(self) -> Path:
        assert self._start is not None
        return self._root / _name_of(self._start)

    def watch(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """The images of the next step; passes of others, such as crops, are not kept.

        The tensor is held: its memory, once free, may become that of other images, such as those of
        an evaluation, which would then be served its tokens.
        """
        self._watched, self._tokens = images, {}
        self._keys = _keys(images)

    def serves(self, explainer: object) -> bool:
        """Whether a method reads none of the layers that are passed over."""
        if isinstance(explainer, RecordExplainer):
            return explainer.depth is not None and explainer.depth <= self._depth - self.first
        return explainer is None or isinstance(explainer, TraceExplainer)

    def serve(self, clip: Clip) -> None:
        """Let a model with the same frozen parts enter its passes after them."""
        opened, encode = clip.image.open, clip.text.encode

        def open_late(x: Float[Tensor, "B 3 H W"]) -> Pass:
            found = opened(x)
            seen = self._watched
            if seen is None or (x.data_ptr(), x.shape) != (seen.data_ptr(), seen.shape):
                return found
            precision = _precision(x.device)
            if precision not in self._tokens:
                self._tokens[precision] = self._look_up(
                    [self._frozen_folder / precision / key for key in self._keys],
                    lambda rows: found.rows(rows).run(found.tokens[rows], 0, self.first),
                ).to(found.tokens)
            tokens = self._tokens[precision]
            return replace(found, tokens=tokens, layers=found.layers[self.first :])

        def encode_texts(ids: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
            folder = self._frozen_folder / _precision(ids.device)
            names = [folder / key for key in _keys(ids, pad=self._pad)]
            return self._look_up(names, lambda rows: encode(ids[rows])).to(ids.device)

        if self.first:
            clip.image = replace(clip.image, open=open_late)
        if self._texts:
            clip.text = replace(clip.text, library=encode_texts, encode_packed=None)

    def embeddings(
        self, batch: CaptionBatch, compute: Callable[[Int[Tensor, " R"]], Tensor]
    ) -> Float[Tensor, "B D"]:
        """Embeddings by the start model of the images of the step, not normalised.

        Args:
            batch: Of the step.
            compute: Embeddings of some of its images.
        """
        folder = self._start_folder / _precision(batch.images.device) / "embeddings"
        return self._look_up([folder / key for key in self._keys], compute).to(batch.images.device)

    def maps(
        self,
        explainer: Explainer,
        batch: CaptionBatch,
        compute: Callable[[Int[Tensor, " R"]], Tensor],
    ) -> Float[Tensor, "P h w"]:
        """Maps of the start model for the phrases of the images of the step.

        Args:
            explainer: The method; its settings are part of the name.
            batch: Of the step.
            compute: Maps of some of its phrases.
        """
        method = f"{type(explainer).__name__} {settings_of(explainer)}"
        # The maps are in single precision, but phrases of a frozen text tower in that of the step.
        folder = self._start_folder / _precision(batch.images.device)
        folder /= hashlib.sha256(method.encode()).hexdigest()[:16]
        texts = _keys(batch.distinct, pad=self._pad)
        pairs = zip(batch.owner.tolist(), batch.phrase.tolist(), strict=True)
        names = [folder / f"{self._keys[image]}-{texts[text]}" for image, text in pairs]
        return self._look_up(names, compute).to(batch.images.device)

    @torch.no_grad()
    def _look_up(
        self, names: Sequence[Path], compute: Callable[[Int[Tensor, " R"]], Tensor]
    ) -> Shaped[Tensor, "B ..."]:
        """Rows by name; what is missing is computed at once and stored."""
        found = {name: _read(name) for name in dict.fromkeys(names)}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            rows = torch.tensor([names.index(name) for name in missing])
            for name, value in zip(missing, compute(rows).float().cpu(), strict=True):
                found[name] = value
                _write(name, value)
        return torch.stack([value for name in names if (value := found[name]) is not None])


def _name_of(clip: Clip, *, without: Collection[str] = ()) -> str:
    """Hash of a model and of its weights, as they are now, except some."""
    # Weights do not tell QuickGELU from GELU, nor how many heads there are.
    digest = hashlib.sha256(f"{clip.model} {clip.image.heads} {clip.text.heads}".encode())
    for name, value in clip.model.state_dict().items():
        if name not in without:
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _precision(device: torch.device) -> str:
    """Number type of matrix products there: that of autocast, if it is on."""
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
    return str(dtype).removeprefix("torch.")


def _read(name: Path) -> Tensor | None:
    path = name.with_suffix(".npy")
    return torch.from_numpy(np.load(path)) if path.exists() else None


def _write(name: Path, value: Tensor) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    aside = name.with_name(f".{name.name}.{os.getpid()}.npy")
    np.save(aside, value.numpy())
    aside.replace(name.with_suffix(".npy"))


def _keys(rows: Shaped[Tensor, "B ..."], pad: int | None = None) -> list[str]:
    """Hashes of rows; padding at the end, of which batches have more or less, does not count."""
    arrays = list(rows.cpu().numpy())
    if pad is not None:
        arrays = [row[: 1 + int(np.flatnonzero(row != pad)[-1])] for row in arrays]
    return [hashlib.sha256(row.tobytes()).hexdigest()[:24] for row in arrays]
