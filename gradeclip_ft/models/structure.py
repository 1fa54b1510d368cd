"""A model's towers as this package sees them, in a sentence each."""

from __future__ import annotations

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.tower import Tower


def image_sentence(loaded: LoadedClip) -> str:
    """Blocks, heads, grid and pooling of the image tower, and whether it can be explained."""
    tower, (height, width) = loaded.clip.image, loaded.image_size
    if tower.unexplained is not None:
        return f"encodes only, no heat maps and no dense features: {tower.unexplained}"
    sides = f"patch {tower.patch}, grid {height // tower.patch} x {width // tower.patch}"
    visual = getattr(loaded.clip.model, "visual", loaded.clip.model)
    kind, trunk = type(visual).__name__, getattr(visual, "trunk", None)
    what = kind if trunk is None else f"{kind} around timm's {type(trunk).__name__}"
    return f"{what}: {_parts(tower)}, {sides}; maps and dense features at any multiple of the patch"


def text_sentence(loaded: LoadedClip) -> str:
    """Blocks, heads, context and pooling of the text tower, and whether it can be explained."""
    tower = loaded.clip.text
    cut = "padding is cut off" if tower.cuts_exactly else "always at full length"
    length = f"context {loaded.tokenizer.context_length}, {cut}"
    if tower.unexplained is not None:
        return f"encodes only, no words explained: {tower.unexplained}; {length}"
    return f"{_parts(tower)}, {length}; words can be explained"


def _parts(tower: Tower) -> str:
    return (
        f"{tower.depth} blocks of width {tower.width}, embedding from the {tower.pooling}, "
        f"{tower.heads} heads there"
    )
