"""Grad-ECLIP as published, for comparison: a full last block, one backward pass per phrase.

Written from equations (7), (15), (19) and (20): the last block runs once more with a single head on
all tokens of one image, and the gradient of each cosine goes back through it to the whole attention
output, of which the class token's row is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Pass
from gradeclip_ft.ops.attention import attend
from gradeclip_ft.ops.heatmap import to_grid
from gradeclip_ft.ops.similarity import cosine, unit


def published_heat(
    opened: Pass,
    tokens: Float[Tensor, "B N W"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps of an image tower with a class token, without a graph.

    Args:
        opened: The forward pass.
        tokens: Input of its last layer.
        target: Embeddings of the phrases.
        owner: Image row of each phrase.
    """
    assert opened.grid is not None
    maps = torch.zeros(len(owner), tokens.shape[1], device=tokens.device)
    for image in range(len(tokens)):
        mine = (owner == image).nonzero().flatten().tolist()
        if mine:
            maps[mine] = _one_image(opened, tokens[image : image + 1].detach(), target[mine])
    return to_grid(maps, opened.grid)


@torch.enable_grad()
def _one_image(opened: Pass, x: Tensor, target: Tensor) -> Tensor:
    """Maps of one image, (P, N)."""
    last = opened.layers[-1]
    with torch.no_grad():
        q, k, v = (rows.float() for rows in last.attend(x, lambda rows: rows))
        o, _ = attend(q, k, v, heads=1)
    o.requires_grad_()
    embedding = opened.head(last.finish(x, o))[:, 0].float()
    near = cosine(q[0, :1].expand_as(k[0]), k[0])[1:]  # class token and patches, (n,)
    spatial = (near - near.min()) / (near.max() - near.min())
    maps = []
    for text in unit(target.detach()):
        score = cosine(embedding, text.unsqueeze(0)).sum()
        (weight,) = torch.autograd.grad(score, o, retain_graph=True)
        relevance = (spatial * (v[0, 1:] @ weight[0, 0])).relu()
        maps.append(torch.cat([relevance.new_zeros(1), relevance]))
    return torch.stack(maps)
