"""The padded square that photos are fitted into, at a size that the model's patches divide."""

from __future__ import annotations

from gradeclip_ft.models.clip import LoadedClip


def square_side(loaded: LoadedClip, wanted: int | None, name: str) -> int:
    """Side of the square in pixels; towers interpolate their positions to it.

    Args:
        loaded: The model.
        wanted: Side that is asked for; None for the model's own.
        name: Of the evaluator, for messages.

    Raises:
        ValueError: The model has no dense features or no square of its own, or its patches do not
            divide the side.
    """
    height, width = loaded.image_size
    tower = loaded.clip.image
    if tower.unexplained is not None:
        raise ValueError(f"{name} needs dense features, but {tower.unexplained}")
    if wanted is None and height != width:
        raise ValueError(
            f"{name} pads photos to squares, the model takes {height} x {width}; set the "
            "evaluator's image_size"
        )
    side = height if wanted is None else wanted
    if side % tower.patch:
        below = side // tower.patch * tower.patch
        raise ValueError(
            f"{name} asks for {side} pixels, no multiple of the model's patch size {tower.patch}; "
            f"set the evaluator's image_size to {below or tower.patch} or {below + tower.patch}"
        )
    return side
