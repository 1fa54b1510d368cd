"""`explain`: pictures and phrases to heat maps, captions to coloured words, on one page."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.tracked import tracked

if TYPE_CHECKING:
    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.explain.pictures import Explained
    from gradeclip_ft.explain.sentences import Sentence
    from gradeclip_ft.models.clip import LoadedClip

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
AT_A_TIME = 8  # pictures
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked of one picture.

    Attributes:
        file: The picture.
        phrases: A map each.
        prompted: The phrases as they are encoded.
        caption: Sentence that they were found in; empty where they were given.
    """

    file: Path
    phrases: list[str]
    prompted: list[str]
    caption: str = ""

    @property
    def sentences(self) -> list[str]:
        """A value for each of their words: the caption, or else the prompted phrases."""
        return [self.caption] if self.caption else self.prompted


def explain(cfg: DictConfig) -> None:
    """Show which pixels and which words make a picture match a text, by one or several methods.

    Writes one page without outside references (choose picture, phrase and method), an overlay of
    every map as PNG, the maps as arrays, and the captions with coloured words. Every method sees
    the same pixels and text vectors.

    python -m gradeclip_ft explain images=dog.jpg phrases=[dog,grass] model=openai_b16
    python -m gradeclip_ft explain images='photos/*.jpg' captions=['a dog on the grass'] run=try
    python -m gradeclip_ft explain images=photos phrases=[dog] explainer=all explainer.rise.masks=99
    """
    asked = _questions(cfg, list(_files(cfg.images)))
    import torch

    from gradeclip_ft.commands import explanations
    from gradeclip_ft.explain.pictures import prepared

    loaded = _load(cfg)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded.clip.to(device)
    _tell_cuts(asked, loaded)
    methods = prepared(_methods(cfg, loaded), loaded)
    words = {name: _make(cfg.words[name]) for name in cfg.explainer if name in cfg.words}
    out, cases = Path(cfg.out), []
    portions = [asked[at : at + AT_A_TIME] for at in range(0, len(asked), AT_A_TIME)]
    for some in tracked(portions, "explaining", len(portions)):
        for question, explained, sentences in _answers(cfg, loaded, some, methods, words):
            case = explanations.case_of(loaded, explained, question, sentences)
            explanations.write(out, question.file, case, explained)
            cases.append(case)
    print(explanations.page(cfg, loaded, cases, out))


def _files(asked: Any) -> Iterator[Path]:
    """Every picture that is asked for, in order.

    Raises:
        FileNotFoundError: A name stands for no picture.
    """
    for name in _listed(asked):
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in sorted(glob.glob(name, recursive=True))]
        if not found:
            raise FileNotFoundError(
                f"images={name}: no such picture; give a file, a folder with pictures "
                f"({', '.join(PICTURES)}), or a pattern in quotes"
            )
        yield from found


def _questions(cfg: DictConfig, files: list[Path]) -> list[Question]:
    """Phrases and sentences for every picture: given, or found in captions."""
    from gradeclip_ft.text.prompts import phrase_prompt

    if (cfg.phrases is None) == (cfg.captions is None):
        raise ValueError("give phrases=[dog,'red car'], or captions=['a dog beside a red car']")

    def prompted(phrases: list[str]) -> list[str]:
        return [phrase_prompt(cfg.prompt, phrase) for phrase in phrases]

    if cfg.phrases is not None:
        phrases = [str(phrase) for phrase in _listed(cfg.phrases)]
        if not phrases or any(not phrase.strip() for phrase in phrases):
            raise ValueError(
                f"phrases are {phrases}, expected texts; write phrases=[dog,'red car']"
            )
        return [Question(file, phrases, prompted(phrases)) for file in files]
    captions = [str(caption) for caption in _listed(cfg.captions)]
    if len(captions) not in (1, len(files)):
        raise ValueError(
            f"{len(captions)} captions for {len(files)} pictures; give one for all, or one for each"
        )
    found = _parsed(captions)
    if len(captions) == 1:
        captions, found = captions * len(files), found * len(files)
    return [
        Question(file, phrases, prompted(phrases), caption)
        for file, caption, phrases in zip(files, captions, found, strict=True)
    ]


def _parsed(captions: list[str]) -> list[list[str]]:
    """Phrases of every caption.

    Raises:
        ValueError: A caption has none.
    """
    from gradeclip_ft.text.phrases import Phrases
    from gradeclip_ft.text.taggers import load_tagger, prepare_tagger

    parse = Phrases(load_tagger(prepare_tagger("auto")), max_phrases=10)
    found = [parse(caption) for caption in captions]
    for caption, phrases in zip(captions, found, strict=True):
        if not phrases:
            raise ValueError(f"no phrase with a noun in {caption!r}; give phrases=[...]")
    return found


def _load(cfg: DictConfig) -> LoadedClip:
    from gradeclip_ft.commands.build import build_clip

    if cfg.run is None:
        return build_clip(OmegaConf.create({"model": cfg.model, "runs_dir": cfg.runs_dir}))
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    model = runs.read_config(weights.parent).model
    start = {"model": model, "runs_dir": cfg.runs_dir, "init_from": str(weights)}
    return build_clip(OmegaConf.create(start))


def _tell_cuts(asked: list[Question], loaded: LoadedClip) -> None:
    """Say what of the texts the model cannot read."""
    for text in dict.fromkeys(text for q in asked for text in [*q.sentences, *q.prompted]):
        read, cut = loaded.tokenizer.words(text)
        if cut:
            end = " ".join(word.text for word in read[-3:])
            log.warning(
                "a text is longer than the %d tokens that %s reads; after '... %s' it leaves out "
                "'%s'",
                loaded.tokenizer.context_length,
                loaded.name,
                end,
                cut,
            )


def _methods(cfg: DictConfig, loaded: LoadedClip) -> dict[str, Explainer]:
    """Methods by name; under per_head also one map for each head of the explained layer."""
    from gradeclip_ft.explain.grad_eclip import GradEclip

    methods = {str(name): _make(node) for name, node in cfg.explainer.items()}
    if cfg.per_head:
        heads = range(loaded.clip.image.heads)
        methods |= {f"head {head}": GradEclip(heads="all", head=head) for head in heads}
    return methods


def _make(node: DictConfig) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")


def _answers(
    cfg: DictConfig,
    loaded: LoadedClip,
    asked: list[Question],
    methods: dict[str, Explainer],
    words: dict[str, Explainer],
) -> Iterator[tuple[Question, Explained, list[Sentence]]]:
    """Maps and words for several pictures at once."""
    import torch

    from gradeclip_ft.explain.pictures import explain_pictures
    from gradeclip_ft.explain.sentences import explain_sentences

    several = len(cfg.explainer) > 1  # one that cannot be done is then left out with a word
    found = explain_pictures(
        loaded,
        [question.file for question in asked],
        [loaded.encode_texts(question.prompted) for question in asked],
        methods,
        geometry=cfg.geometry,
        longest=cfg.longest,
        skip=several,
    )
    texts = [sentence for question in asked for sentence in question.sentences]
    of_picture = [one.embedding for one, q in zip(found, asked, strict=True) for _ in q.sentences]
    read = iter(explain_sentences(loaded, texts, torch.stack(of_picture), words, skip=True))
    for question, explained in zip(asked, found, strict=True):
        yield question, explained, [next(read) for _ in question.sentences]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | ListConfig) else [value]
