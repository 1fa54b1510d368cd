"""Fine-grained fine-tuning of CLIP from plain captions, by Grad-ECLIP heat maps.

Map of the package, from the bottom up: `ops` (tensor functions), `batch` (what loaders yield);
`text` (phrases), `results` (measured numbers), `report` (pages); `models` (towers and weights),
`losses`, `metrics`, `data`; `explain` (heat maps), `export`; `objectives` (batch to loss),
`evaluators` (model to numbers); `training`; `commands`; `api` (for use from Python, docs/api.md).

Letters in shapes: B images, P phrases of the batch, U distinct phrases, R regions, M texts, N
tokens of a tower (class token and h·w patches, or L), L context length, C tower width, A heads, D
joint embedding, h w patch grid, H W pixels, K classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradeclip_ft.api import dense as dense
    from gradeclip_ft.api import evaluate as evaluate
    from gradeclip_ft.api import explain as explain
    from gradeclip_ft.api import from_open_clip as from_open_clip
    from gradeclip_ft.api import load as load
    from gradeclip_ft.api import region_embeddings as region_embeddings

__version__ = "0.1.0"

PUBLIC = ("dense", "evaluate", "explain", "from_open_clip", "load", "region_embeddings")


def __getattr__(name: str) -> Any:
    """The public functions, at their first use: torch takes seconds to import."""
    if name in PUBLIC:
        return getattr(import_module("gradeclip_ft.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
