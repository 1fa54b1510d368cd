"""`explain`: pictures and phrases to heat maps, captions to coloured words, on one page."""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import build_clip, make
from gradeclip_ft.commands.cli import tracked
from gradeclip_ft.explain.driver import Explained, shown
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.report.content import Case, Page, Words
from gradeclip_ft.report.figures import draw_still, draw_words, overlay
from gradeclip_ft.report.page import render
from gradeclip_ft.results.record import versions

if TYPE_CHECKING:
    from gradeclip_ft.explain.driver import Sentence
    from gradeclip_ft.models.clip import LoadedClip


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked of one picture.

    Attributes:
        file: The picture.
        phrases: A map each.
        prompted: The phrases as they are encoded.
        caption: Sentence that they were found in; empty where they were given.
        folder: Name of the folder for what is drawn; another one for each picture.
    """

    file: Path
    phrases: list[str]
    prompted: list[str]
    caption: str = ""
    folder: str = ""

    @property
    def sentences(self) -> list[str]:
        """A value for each of their words: the caption, or else the prompted phrases."""
        return [self.caption] if self.caption else self.prompted


def questions(cfg: DictConfig) -> list[Question]:
    """Every picture with its phrases: given, or found in captions.

    Raises:
        FileNotFoundError: A name stands for no picture.
        ValueError: Neither phrases nor captions, an empty one, or a wrong number of captions.
    """
    found = _asked(cfg, list(_files(cfg.images)))
    folders = slugs([question.file.stem for question in found])
    return [replace(one, folder=folder) for one, folder in zip(found, folders, strict=True)]


def _asked(cfg: DictConfig, files: list[Path]) -> list[Question]:
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


def tell_cuts(asked: list[Question], loaded: LoadedClip) -> None:
    """Say in the log what of the texts the model cannot read."""
    for text in dict.fromkeys(text for q in asked for text in [*q.sentences, *q.prompted]):
        read, cut = loaded.tokenizer.words(text)
        if cut:
            log.warning(
                "a text is longer than the %d tokens that %s reads; after '... %s' it leaves out "
                "'%s'",
                loaded.tokenizer.context_length,
                loaded.name,
                " ".join(word.text for word in read[-3:]),
                cut,
            )


def slugs(texts: Sequence[str]) -> list[str]:
    """File names of texts, each another one."""
    taken: set[str] = set()
    names = []
    for text in texts:
        first = name = slug(text)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{first}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def slug(text: str) -> str:
    """A file name of a text: letters and digits, the rest as dashes."""
    return re.sub(r"[^\w]+", "-", text).strip("-")[:60] or "phrase"


def _files(asked: Any) -> Iterator[Path]:
    """Every picture that is asked for, in order."""
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


def _parsed(captions: list[str]) -> list[list[str]]:
    """Phrases of every caption.

    Raises:
        ValueError: A caption has none.
    """
    from gradeclip_ft.text.phrases import Phrases, load_tagger, prepare_tagger

    parse = Phrases(load_tagger(prepare_tagger("auto")), max_phrases=10)
    found = [parse(caption) for caption in captions]
    for caption, phrases in zip(captions, found, strict=True):
        if not phrases:
            raise ValueError(f"no phrase with a noun in {caption!r}; give phrases=[...]")
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | ListConfig) else [value]


if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.explain.driver import Explained, Sentence
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.models.other.classifier import LoadedClassifier

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

    from gradeclip_ft.explain.driver import prepared
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
            case = case_of(loaded, explained, question, sentences)
            write(out / question.folder, case, explained)
            cases.append(case)
            methods = {name: methods[name] for name in explained.heat}  # told once what cannot be
            words = {name: words[name] for one in sentences[:1] for name in one.values}
    if not cases:
        raise ValueError(f"none of the {len(asked)} pictures can be read")
    print(page(cfg, loaded, cases, out))


def _readable(
    asked: Sequence[Question], *, alone: bool
) -> tuple[list[Question], list[Image.Image]]:
    """The questions whose picture can be read, with it; one that cannot is named in the log.

    Raises:
        ValueError: There is no other one.
    """
    from gradeclip_ft.images import open_picture

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
    from gradeclip_ft.explain.driver import explain_pictures

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

    from gradeclip_ft.explain.driver import explain_sentences
    from gradeclip_ft.models.clip import LoadedClip

    if not asked or not isinstance(loaded, LoadedClip):
        return [[] for _ in asked]
    texts = [sentence for question in asked for sentence in question.sentences]
    pairs = zip(found, asked, strict=True)
    embeddings = [one.embedding for one, question in pairs for _ in question.sentences]
    read = iter(explain_sentences(loaded, texts, torch.stack(embeddings), words, skip=True))
    return [[next(read) for _ in question.sentences] for question in asked]


PAGE, MAPS, SENTENCES = "index.html", "maps.npz", "words.json"
HIDDEN = ("_target_", "create_graph")  # of a method's settings on the page


def case_of(
    loaded: Loaded, explained: Explained, question: Question, sentences: Sequence[Sentence]
) -> Case:
    """One picture for the page."""
    kind = "cosine" if isinstance(loaded, LoadedClip) else "logit"
    return Case(
        image=shown(explained.pixels, loaded).numpy(),
        phrases=question.phrases,
        heat={method: heat.numpy() for method, heat in explained.heat.items()},
        caption=question.caption,
        source=question.file.name,
        scores=[f"{kind} {value:.3f}".replace("-", "−") for value in explained.score.tolist()],
        sentences=[
            Words(
                words=one.words,
                values={name: value.tolist() for name, value in one.values.items()},
                cut=one.cut,
            )
            for one in sentences
        ],
    )


def write(folder: Path, case: Case, explained: Explained) -> None:
    """Overlays, arrays and coloured captions of one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    names = slugs(case.phrases)
    for method, maps in case.heat.items():
        for name, heat in zip(names, maps, strict=True):
            Image.fromarray(overlay(case.image, heat)).save(folder / f"{name}-{slug(method)}.png")
    arrays: dict[str, Any] = dict(case.heat)
    np.savez_compressed(
        folder / MAPS,
        phrases=np.array(list(case.phrases)),
        score=explained.score.numpy(),
        **arrays,
    )
    read = [one for one in case.sentences if one.values and one.words]
    lines = [{"words": list(o.words), "cut": o.cut, "values": dict(o.values)} for o in read]
    (folder / SENTENCES).write_text(json.dumps(lines, ensure_ascii=False, indent=1), "utf-8")
    for number, one in enumerate(read, start=1):
        draw_words(one, folder / f"words-{number}.png")


def page(cfg: DictConfig, loaded: Loaded, cases: Sequence[Case], out: Path) -> Path:
    """The page, and the sheet of all maps if one is asked for."""
    methods = [name for name in cases[0].heat if all(name in case.heat for case in cases)]
    settings = {
        "model": loaded.name,
        "weights": str(cfg.run or loaded.weights or "its own"),
        "hash of weights": loaded.weights_hash[:16],
        "prompt": str(cfg.prompt),
        "geometry": f"aspect, at most {cfg.longest} pixels"
        if cfg.geometry == "aspect"
        else f"model, {loaded.image_size[1]} x {loaded.image_size[0]} pixels",
    }
    words = {name for case in cases for one in case.sentences for name in one.values}
    of_words = {str(name): _settings(cfg.words[name]) for name in cfg.words if name in words}
    if cfg.per_head:
        settings["heads"] = "Grad-ECLIP's defaults with heads=all, one head each"
    of_methods = {
        str(name): _settings(node) for name, node in cfg.explainer.items() if name in methods
    }
    path = render(
        Page(
            title="What the match is made of",
            intro="Where a picture matches a phrase, and which words make it match.",
            methods=methods,
            first=next(iter(methods)),
            kind="Method",
            cases=cases,
            facts={
                "Settings": settings,
                "Methods": of_methods,
                **({"Words": of_words} if of_words else {}),
                "Versions": dict(versions()),
            },
        ),
        out / PAGE,
    )
    if cfg.picture is not None:
        draw_still(cases, methods, Path(cfg.picture), columns=24, each=3)
    return path


def _settings(node: DictConfig) -> str:
    plain = OmegaConf.to_container(node)
    assert isinstance(plain, dict)
    pairs = [(str(key), value) for key, value in plain.items() if key not in HIDDEN]
    return ", ".join(f"{key} {value}" for key, value in pairs) or "no settings"
