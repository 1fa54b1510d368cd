"""`explain`: pictures and phrases to heat maps, captions to coloured words, on one page."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import build_clip, make
from gradeclip_ft.commands.questions import Question, questions, tell_cuts
from gradeclip_ft.commands.tracked import tracked

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.explain.pictures import Explained
    from gradeclip_ft.explain.sentences import Sentence
    from gradeclip_ft.models.classifier import LoadedClassifier
    from gradeclip_ft.models.clip import LoadedClip

    Loaded: TypeAlias = LoadedClip | LoadedClassifier

AT_A_TIME = 8  # pictures
log = logging.getLogger(__name__)


def explain(cfg: DictConfig) -> None:
    """Show which pixels and which words make a picture match a text, by one or several methods.

    Writes one page without outside references (choose picture, phrase and method), an overlay of
    every map as PNG, the maps as arrays, and the captions with coloured words. Every method sees
    the same pixels and text vectors. Of a classifier (model=classifier), phrases are class names.

    python -m gradeclip_ft explain images=dog.jpg phrases=[dog,grass] model=openai_b16
    python -m gradeclip_ft explain images='photos/*.jpg' captions=['a dog on the grass'] run=try
    python -m gradeclip_ft explain images=photos phrases=[dog] explainer=all explainer.rise.masks=99
    """
    asked = questions(cfg)
    import torch

    from gradeclip_ft.commands import explanations
    from gradeclip_ft.explain.pictures import prepared
    from gradeclip_ft.models.clip import LoadedClip

    loaded = _load(cfg)
    loaded.clip.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    words: dict[str, Explainer] = {}
    if isinstance(loaded, LoadedClip):
        tell_cuts(asked, loaded)
        words = {str(name): make(cfg.words[name]) for name in cfg.explainer if name in cfg.words}
    methods = prepared(_methods(cfg, loaded), loaded)
    out, cases = Path(cfg.out), []
    portions = [asked[at : at + AT_A_TIME] for at in range(0, len(asked), AT_A_TIME)]
    for portion in tracked(portions, "explaining", len(portions)):
        some, pictures = _readable(portion, alone=len(asked) == 1)
        found = _maps(cfg, loaded, some, pictures, methods)
        read = _sentences(loaded, some, found, words)
        for question, explained, sentences in zip(some, found, read, strict=True):
            case = explanations.case_of(loaded, explained, question, sentences)
            explanations.write(out / question.folder, case, explained)
            cases.append(case)
            methods = {name: methods[name] for name in explained.heat}  # told once what cannot be
            words = {name: words[name] for one in sentences[:1] for name in one.values}
    if not cases:
        raise ValueError(f"none of the {len(asked)} pictures can be read")
    print(explanations.page(cfg, loaded, cases, out))


def _readable(
    asked: Sequence[Question], *, alone: bool
) -> tuple[list[Question], list[Image.Image]]:
    """The questions whose picture can be read, with it; one that cannot is named in the log.

    Raises:
        ValueError: There is no other one.
    """
    from gradeclip_ft.models.picture import open_picture

    some, pictures = [], []
    for question in asked:
        try:
            pictures.append(open_picture(question.file))
        except ValueError as error:
            if alone:
                raise
            log.warning("left out: %s", error)
            continue
        some.append(question)
    return some, pictures


def _load(cfg: DictConfig) -> Loaded:
    if cfg.run is None:
        loaded: Loaded = make(cfg.model)
        return loaded
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    model = runs.read_config(weights.parent).model
    start = {"model": model, "runs_dir": cfg.runs_dir, "init_from": str(weights)}
    return build_clip(OmegaConf.create(start))


def _methods(cfg: DictConfig, loaded: Loaded) -> dict[str, Explainer]:
    """Methods by name; under per_head also one map for each head of the explained layer."""
    from gradeclip_ft.explain.grad_eclip import GradEclip

    methods = {str(name): make(node) for name, node in cfg.explainer.items()}
    if cfg.per_head:
        heads = range(loaded.clip.image.heads)
        methods |= {f"head {head}": GradEclip(heads="all", head=head) for head in heads}
    return methods


def _maps(
    cfg: DictConfig,
    loaded: Loaded,
    asked: Sequence[Question],
    pictures: Sequence[Image.Image],
    methods: Mapping[str, Explainer],
) -> list[Explained]:
    """Maps of several pictures at once."""
    from gradeclip_ft.explain.pictures import explain_pictures

    return explain_pictures(
        loaded,
        pictures,
        [_targets(loaded, question) for question in asked],
        methods,
        geometry=cfg.geometry,
        longest=cfg.longest,
        skip=len(cfg.explainer) > 1,  # one that cannot be done is then left out with a word
    )


def _targets(loaded: Loaded, question: Question) -> Tensor:
    """What the maps of a picture speak for: texts, or classes."""
    from gradeclip_ft.models.clip import LoadedClip

    if isinstance(loaded, LoadedClip):
        return loaded.encode_texts(question.prompted)
    if question.caption:
        raise ValueError(
            f"{loaded.name} knows classes, no captions; give class names as phrases=[...]"
        )
    return loaded.targets(question.phrases)


def _sentences(
    loaded: Loaded,
    asked: Sequence[Question],
    found: Sequence[Explained],
    words: Mapping[str, Explainer],
) -> list[list[Sentence]]:
    """Sentences of every picture; without values where no method reads words."""
    import torch

    from gradeclip_ft.explain.sentences import explain_sentences
    from gradeclip_ft.models.clip import LoadedClip

    if not asked or not isinstance(loaded, LoadedClip):
        return [[] for _ in asked]
    texts = [sentence for question in asked for sentence in question.sentences]
    pairs = zip(found, asked, strict=True)
    embeddings = [one.embedding for one, question in pairs for _ in question.sentences]
    read = iter(explain_sentences(loaded, texts, torch.stack(embeddings), words, skip=True))
    return [[next(read) for _ in question.sentences] for question in asked]
