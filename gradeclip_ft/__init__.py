"""Fine-grained fine-tuning of CLIP from plain captions, by Grad-ECLIP heat maps.

Map of the package, from the bottom up: `ops` (tensor functions), `batch` (what loaders yield);
`text` (phrases), `results` (measured numbers), `report` (pages); `models` (towers and weights),
`losses`, `metrics`, `data`; `explain` (heat maps), `export`; `objectives` (batch to loss),
`evaluators` (model to numbers); `training`; `commands`.

Letters in shapes: B images, P phrases of the batch, U distinct phrases, R regions, M texts, N
tokens of a tower (class token and h·w patches, or L), L context length, C tower width, A heads, D
joint embedding, h w patch grid, H W pixels, K classes.
"""

__version__ = "0.1.0"
