"""What frozen parts compute, kept on disk: a step then costs only what learns.

With the first blocks and the text tower frozen, the tokens that enter the first block that learns
and the embeddings of texts are the same at every visit and in every run. They are stored in single
files by content (pixels, token ids) below a folder that is named by the frozen weights, so nothing
else can be taken for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.explain.base import RecordExplainer, TraceExplainer
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import Pass
from gradeclip_ft.training.optim import BLOCK


class FrozenCache:
    """Serves a model, and teachers that share its frozen parts.

    Args:
        clip: The model, with `requires_grad` set.
        folder: Grows by 4 bytes for every number of a token: 0.4 MB for an image of 257 tokens
            with 384 channels.

    Raises:
        ValueError: No block of the image tower is frozen, or its patches learn.
    """

    def __init__(self, clip: Clip, folder: str | Path) -> None:
        learning = {n for n, value in clip.model.named_parameters() if value.requires_grad}
        image = [name for name in learning if name.startswith("visual.")]
        blocks = [int(found[1]) for name in image if (found := BLOCK.search(name))]
        self._depth = clip.image.depth
        self.first = min(blocks, default=self._depth - 1)
        if not self.first:
            raise ValueError("a cache keeps what frozen blocks compute; set optim.image_blocks")
        self._texts = not any(not n.startswith(("visual.", "logit_")) for n in learning)
        digest = hashlib.sha256()
        for name, value in clip.model.state_dict().items():
            if name not in learning:
                digest.update(name.encode() + value.cpu().numpy().tobytes())
        self._folder = Path(folder) / digest.hexdigest()[:16]
        self._watched: tuple[int, torch.Size] | None = None
        self._keys: list[str] = []
        self._tokens: Tensor | None = None

    def watch(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """The images of the next step; passes of others, such as crops, are not kept."""
        self._watched, self._tokens = (images.data_ptr(), images.shape), None
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
            if (x.data_ptr(), x.shape) != self._watched:
                return found
            if self._tokens is None:
                self._tokens = self._look_up(
                    self._keys, lambda rows: found.rows(rows).run(found.tokens[rows], 0, self.first)
                ).to(x.device)
            return replace(found, tokens=self._tokens, layers=found.layers[self.first :])

        def encode_texts(ids: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
            keys = _keys(ids, pad=clip.text.pad)
            return self._look_up(keys, lambda rows: encode(ids[rows])).to(ids.device)

        clip.image = replace(clip.image, open=open_late)
        if self._texts:
            clip.text = replace(clip.text, library=encode_texts, encode_packed=None)

    @torch.no_grad()
    def _look_up(
        self, keys: Sequence[str], compute: Callable[[Int[Tensor, " R"]], Tensor]
    ) -> Shaped[Tensor, "B ..."]:
        """Rows by key; what is missing is computed at once and stored."""
        found = {key: self._read(key) for key in dict.fromkeys(keys)}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            rows = torch.tensor([keys.index(key) for key in missing])
            for key, value in zip(missing, compute(rows).float().cpu(), strict=True):
                found[key] = value
                self._write(key, value)
        return torch.stack([value for key in keys if (value := found[key]) is not None])

    def _read(self, key: str) -> Tensor | None:
        path = self._folder / f"{key}.npy"
        return torch.from_numpy(np.load(path)) if path.exists() else None

    def _write(self, key: str, value: Tensor) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".{key}.{os.getpid()}.npy"
        np.save(aside, value.numpy())
        aside.replace(self._folder / f"{key}.npy")


def _keys(rows: Shaped[Tensor, "B ..."], pad: int | None = None) -> list[str]:
    """Hashes of rows; padding at the end, of which batches have more or less, does not count."""
    arrays = list(rows.cpu().numpy())
    if pad is not None:
        arrays = [row[: 1 + int(np.flatnonzero(row != pad)[-1])] for row in arrays]
    return [hashlib.sha256(row.tobytes()).hexdigest()[:24] for row in arrays]
