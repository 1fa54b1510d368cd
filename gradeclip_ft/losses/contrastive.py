"""Global loss: symmetric contrast of whole images and whole captions (Grad-ECLIP, eq. 21)."""

from __future__ import annotations

from jaxtyping import Float
from open_clip.loss import ClipLoss
from torch import Tensor

from gradeclip_ft.ops.distributed import rank, world_size
from gradeclip_ft.ops.similarity import unit


def contrastive_loss(
    image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE on cosines (eq. 21; open_clip's ClipLoss).

    The second term of (21) mixes its indices in print; it is read as text to image. Under several
    processes every process contrasts its own rows with the rows of all, gathered with gradient, so
    the averaged gradient is that of one process on the joined batch.

    Args:
        image: Embeddings F_I, any length.
        text: Embeddings F_T of the captions, any length.
        scale: Inverse temperature, exp(log_scale).
    """
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())
    result: Tensor = loss(unit(image), unit(text), scale.float())
    return result
