"""Licences of published start weights, by model and tag of open_clip.

Fine-tuned weights stay under the terms of the weights they come from. What is not listed is not
guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Licence:
    """Terms of a set of weights.

    Attributes:
        name: Identifier as model cards on the Hugging Face hub have it.
        note: One sentence for the reader.
    """

    name: str
    note: str


MIT = "MIT, as their publisher states"
# Model, tag, identifier, note; the first that matches counts.
KNOWN = (
    ("shapes_tiny", "packaged", "apache-2.0", "part of gradeclip_ft, Apache-2.0"),
    ("EVA0*", "merged2b_*", "mit", f"EVA-CLIP: {MIT}"),
    ("EVA0*", "laion*", "mit", f"EVA-CLIP: {MIT}"),
    ("*SigLIP*", "webli", "apache-2.0", "SigLIP: Apache-2.0, as their publisher states"),
    ("*", "openai", "mit", f"OpenAI CLIP: {MIT}"),
    ("*", "laion400m_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "laion2b_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "laion5b_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "datacomp_*", "mit", f"DataComp: {MIT}"),
    ("*", "dfn*", "other", "DFN: Apple's own licence, for research; read it before passing on"),
    ("*", "metaclip_*", "cc-by-nc-4.0", "MetaCLIP: CC-BY-NC-4.0, not for commercial use"),
)


def licence_of(model: str, weights: str) -> Licence:
    """Licence of the start weights.

    Args:
        model: Name of the architecture.
        weights: Tag of open_clip, `packaged`, `random`, or a file.
    """
    for models, tags, name, note in KNOWN:
        if fnmatchcase(model, models) and fnmatchcase(weights, tags):
            return Licence(name, note)
    if weights == "random":
        return Licence("unknown", "training began at random weights; there is nothing to inherit")
    return Licence(
        "unknown",
        f"no licence is recorded for the weights {weights} of {model}; ask their publisher before "
        "passing this on",
    )
