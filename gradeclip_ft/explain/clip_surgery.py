"""CLIP Surgery (Li et al., 2023): a second path of value-value attention, redundancy removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.other.classifier import LoadedImageModel
from gradeclip_ft.models.trace import Heads, Record
from gradeclip_ft.ops.attention import DensePath, attend_alike
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class ClipSurgery:
    """Tokens of a path z <- z + add(softmax(s v vᵀ) v), matched with the text.

    v comes from the original path's input, the second path has no MLP. What all texts share is
    redundant: with other texts the mean of the products over texts, weighted by how well each text
    matches the image; without, the embedding of the empty text.

    Attributes:
        depth: Layers with a second path, at most.
        dense: What attends to what on the second path, by `DensePath`; of one layer and with the
            empty text, "vv" is the dense path of that name.
        others: Texts beside the target, encoded by `prepare`; none for the empty text.
        embedded: Their unit embeddings.
    """

    depth: int | None = 6
    heads: Heads = "all"
    dense: DensePath = "vv"
    others: Sequence[str] = ()
    embedded: Float[Tensor, "M D"] | None = None

    compares_texts: ClassVar[bool] = True

    def prepare(self, loaded: LoadedImageModel) -> ClipSurgery:
        """This method with its texts encoded; as it is where the model takes no texts."""
        if not isinstance(loaded, LoadedClip):
            return self
        return replace(self, embedded=loaded.encode_texts(list(self.others) or [""]))

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target.

        Raises:
            ValueError: `prepare` was not called.
        """
        if self.embedded is None:
            raise ValueError("CLIP Surgery compares with other texts; call prepare(loaded) first")
        z, grid = record.layers[0].x.detach(), record.opened.grid
        for layer in record.layers:
            q, k, v = (rows.detach() for rows in (layer.q, layer.k, layer.v))
            o = attend_alike(self.dense, q, k, v, heads=layer.layer.heads, grid=grid)
            z = z + layer.layer.add(o)
        features = unit(record.opened.head(z))  # (P, N, D)
        others = self.embedded.to(target)
        if not self.others:
            return torch.bmm(features, (target - others).unsqueeze(2)).squeeze(2)
        texts = torch.cat([target.unsqueeze(1), others.expand(len(target), -1, -1)], dim=1)
        image = unit(record.embedding.detach())
        prob = (2 * torch.bmm(texts, image.unsqueeze(2)).squeeze(2)).softmax(-1)  # (P, M)
        share = prob / prob.mean(-1, keepdim=True)
        weighted = texts * share.unsqueeze(2)
        only = weighted[:, 0] - weighted.mean(1)  # (P, D)
        return torch.bmm(features, only.unsqueeze(2)).squeeze(2)
