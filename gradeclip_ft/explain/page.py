"""What pictures, texts and maps become on a page, for the command and for Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gradeclip_ft.explain.base import Explainer, settings_of
from gradeclip_ft.explain.driver import Explained, to_display_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.other.classifier import LoadedImageModel
from gradeclip_ft.report.content import Case, Page, Words
from gradeclip_ft.results.record import versions


def case_of(
    loaded: LoadedImageModel,
    explained: Explained,
    phrases: Sequence[str],
    *,
    source: str,
    caption: str = "",
    sentences: Sequence[Words] = (),
) -> Case:
    """One picture for the page, as the model saw it.

    Args:
        loaded: The model.
        explained: What it makes of the picture.
        phrases: Texts of the maps.
        source: Name of the picture.
        caption: Sentence that the phrases come from.
        sentences: With coloured words.
    """
    kind = "cosine" if isinstance(loaded, LoadedClip) else "logit"
    return Case(
        image=to_display_image(explained.seen.pixels, loaded).numpy(),
        phrases=phrases,
        heat={method: heat.numpy() for method, heat in explained.heat.items()},
        caption=caption,
        source=source,
        scores=[f"{kind} {value:.3f}".replace("-", "−") for value in explained.score.tolist()],
        sentences=sentences,
    )


def explanation_page(
    loaded: LoadedImageModel,
    cases: Sequence[Case],
    settings: Mapping[str, str],
    explainers: Mapping[str, Explainer],
    words: Mapping[str, Explainer] | None = None,
) -> Page:
    """The page of all pictures, with the methods that every one of them has.

    Args:
        loaded: The model.
        cases: The pictures; at least one.
        settings: Further ones beside the model and its weights.
        explainers: Methods whose settings are shown, by name.
        words: The same for words.
    """
    methods = [name for name in cases[0].heat if all(name in case.heat for case in cases)]
    coloured = {name for case in cases for one in case.sentences for name in one.values}
    facts = {
        "Settings": {
            "model": loaded.name,
            "weights": str(loaded.weights or "its own"),
            "hash of weights": loaded.weights_hash[:16],
            **settings,
        },
        "Methods": _settings(explainers, methods),
        "Words": _settings(words or {}, coloured),
        "Versions": dict(versions()),
    }
    return Page(
        title="What the match is made of",
        intro="Where a picture matches a phrase, and which words make it match.",
        methods=methods,
        first=methods[0],
        kind="Method",
        cases=cases,
        facts={heading: listed for heading, listed in facts.items() if listed},
    )


def in_words(loaded: LoadedImageModel, geometry: str, shortest: int) -> str:
    """What becomes of a picture before the model sees it."""
    if geometry == "aspect":
        return f"aspect, shorter side at most {shortest} pixels"
    return f"model, {loaded.image_size[1]} x {loaded.image_size[0]} pixels"


def _settings(explainers: Mapping[str, Explainer], shown: Collection[str]) -> dict[str, str]:
    """Settings of those methods that the page shows; gradients are a matter of training."""
    told = {
        name: [f"{key} {value}" for key, value in settings_of(method) if key != "create_graph"]
        for name, method in explainers.items()
        if name in shown
    }
    return {name: ", ".join(each) or "no settings" for name, each in told.items()}
