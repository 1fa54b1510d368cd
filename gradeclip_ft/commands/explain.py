"""`explain`: pictures and phrases to heat maps, captions to coloured words, on one page."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from torch import Tensor

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import build_clip, make
from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import (
    Explained,
    Supported,
    explain_pictures,
    explain_sentences,
    pixels_of,
    to_display_image,
)
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.images import IMAGE_SUFFIXES, ImageError, images_in
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.other.classifier import LoadedImageModel as Loaded
from gradeclip_ft.report.content import Case, Page, Words
from gradeclip_ft.report.figures import draw_still, overlay
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.record import versions
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger, prepare_tagger
from gradeclip_ft.text.prompts import phrase_prompt

AT_A_TIME = 8  # pictures
HIDDEN = ("_target_", "create_graph")  # of a method's settings on the page
PAGE, MAPS, SENTENCES = "index.html", "maps.npz", "words.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExplainInput:
    """One picture, and the texts that are looked for in it.

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


def explain(cfg: DictConfig) -> None:
    """Show which pixels and which words make a picture match a text, by one or several methods.

    Writes one page without outside references (choose picture, phrase and method), an overlay of
    every map as PNG, the maps as arrays, and the captions with coloured words. Every method sees
    the same pixels and text vectors. Of a classifier (model=classifier), phrases are class names.

    python -m gradeclip_ft explain images=dog.jpg phrases=[dog,grass] model=openai_b16
    python -m gradeclip_ft explain images='photos/*.jpg' captions=['a dog on the grass'] run=try
    python -m gradeclip_ft explain images=photos phrases=[dog] explainer=all explainer.rise.masks=99
    """
    inputs = read_inputs(cfg)
    loaded = _load(cfg)
    loaded.image_model.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    words: dict[str, Explainer] = {}
    if isinstance(loaded, LoadedClip):
        warn_truncated_texts(inputs, loaded)
        words = {
            str(name): make(cfg.words[name], "words") for name in cfg.explainer if name in cfg.words
        }
    methods = {str(name): make(node, "explainer") for name, node in cfg.explainer.items()}
    skip = len(methods) > 1
    if cfg.per_head:
        heads = range(loaded.image_model.image.heads)
        methods |= {f"head {head}": GradEclip(heads="all", head=head) for head in heads}
    supported = Supported(methods, loaded, skip=skip)
    out, cases = Path(cfg.out), []
    portions = [inputs[at : at + AT_A_TIME] for at in range(0, len(inputs), AT_A_TIME)]
    for portion in progress_bar(portions, "explaining", len(portions)):
        some: list[ExplainInput] = []
        pixels: list[Tensor] = []
        for item in portion:
            try:
                pixels.append(pixels_of(loaded, item.file, cfg.geometry, cfg.shortest))
                some.append(item)
            except (ImageError, FileNotFoundError) as error:  # broken, or a dangling link
                if len(inputs) == 1:
                    raise
                log.warning("left out: %s", error)
        targets = [_targets(loaded, item) for item in some]
        found = explain_pictures(loaded, pixels, targets, supported)
        read = _sentences(loaded, some, found, words)
        for item, explained, sentences in zip(some, found, read, strict=True):
            case = _case(loaded, explained, item, sentences)
            _write(out / item.folder, case, explained)
            cases.append(case)
            words = {name: words[name] for one in sentences[:1] for name in one.values}
    if not cases:
        raise ValueError(f"none of the {len(inputs)} pictures can be read")
    print(_page(cfg, loaded, cases, out))


def read_inputs(cfg: DictConfig) -> list[ExplainInput]:
    """Every picture with its phrases: given, or found in captions.

    Raises:
        FileNotFoundError: A name stands for no picture.
        ValueError: Neither phrases nor captions, an empty one, or a wrong number of captions.
    """
    files = list(picture_files(cfg.images))
    if (cfg.phrases is None) == (cfg.captions is None):
        raise ValueError("give phrases=[dog,'red car'], or captions=['a dog beside a red car']")
    captions: list[str] = [""]
    if cfg.phrases is not None:
        found = [listed("phrases", cfg.phrases)]
    else:
        captions = listed("captions", cfg.captions)
        if len(captions) not in (1, len(files)):
            raise ValueError(
                f"{len(captions)} captions for {len(files)} pictures; give one for all, or for each"
            )
        parse = PhraseFinder(load_tagger(prepare_tagger("auto")), max_phrases=10)
        found = [parse(caption) for caption in captions]
        if [] in found:
            caption = captions[found.index([])]
            raise ValueError(f"no phrase with a noun in {caption!r}; give phrases=[...]")
    if len(captions) == 1:
        captions, found = captions * len(files), found * len(files)
    folders = slugs([file.stem for file in files])
    return [
        ExplainInput(file, phrases, [phrase_prompt(cfg.prompt, each) for each in phrases], *names)
        for file, phrases, *names in zip(files, found, captions, folders, strict=True)
    ]


def picture_files(images: Any) -> Iterator[Path]:
    """Every picture that is asked for, in order."""
    for name in listed("images", images):
        if os.path.isdir(name):  # pathlib raises for a name that is too long
            found = images_in(Path(name))
        elif os.path.isfile(name):
            found = [Path(name)]
        else:
            found = [Path(file) for file in sorted(glob.glob(name, recursive=True))]
        if not found:
            raise FileNotFoundError(
                f"images={name}: no such picture; give a file, a folder with pictures "
                f"({', '.join(IMAGE_SUFFIXES)}), or a pattern in quotes"
            )
        yield from found


def listed(key: str, value: Any) -> list[str]:
    """The texts of an option that takes one or several."""
    found = list(value) if isinstance(value, list | ListConfig) else [value]
    flat = all(isinstance(text, str | int | float) and str(text).strip() for text in found)
    if not found or not flat:
        raise ValueError(f"{key} are {found}, expected texts; write {key}=[dog,'red car']")
    return [str(text) for text in found]


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
    """A file name of a text: letters and digits, the rest as dashes; at most 60 bytes."""
    name = re.sub(r"[^\w]+", "-", text).strip("-").encode()[:60]
    return name.decode(errors="ignore") or "phrase"


def warn_truncated_texts(inputs: Sequence[ExplainInput], loaded: LoadedClip) -> None:
    """Log what of the texts the model cannot read."""
    texts = [text for item in inputs for text in [*item.sentences, *item.prompted]]
    for text in dict.fromkeys(texts):
        read, cut = loaded.tokenizer.words(text)
        if cut:
            length, end = loaded.tokenizer.context_length, " ".join(w.text for w in read[-3:])
            log.warning(
                "%s reads %d tokens; it leaves out '%s' after '%s'", loaded.name, length, cut, end
            )


def _load(cfg: DictConfig) -> Loaded:
    if cfg.run is None:
        loaded: Loaded = make(cfg.model, "model")
        return loaded
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    model = runs.read_config(weights.parent).model
    start = {"model": model, "runs_dir": cfg.runs_dir, "init_from": str(weights)}
    return build_clip(OmegaConf.create(start))


def _targets(loaded: Loaded, item: ExplainInput) -> Tensor:
    """What the maps of a picture are for: texts, or classes."""
    if isinstance(loaded, LoadedClip):
        return loaded.encode_texts(item.prompted)
    if item.caption:
        raise ValueError(
            f"{loaded.name} knows classes, not captions; give class names as phrases=[...]"
        )
    return loaded.targets(item.phrases)


def _sentences(
    loaded: Loaded,
    inputs: Sequence[ExplainInput],
    found: Sequence[Explained],
    methods: dict[str, Explainer],
) -> list[list[Words]]:
    """Sentences of every picture; without values where no method reads words."""
    if not inputs or not isinstance(loaded, LoadedClip):
        return [[] for _ in inputs]
    texts = [sentence for item in inputs for sentence in item.sentences]
    counts = torch.tensor([len(item.sentences) for item in inputs])
    embeddings = torch.stack([one.embedding for one in found]).repeat_interleave(counts, 0)
    read = iter(explain_sentences(loaded, texts, embeddings, methods, skip=True))
    return [[next(read) for _ in item.sentences] for item in inputs]


def _case(
    loaded: Loaded, explained: Explained, item: ExplainInput, sentences: Sequence[Words]
) -> Case:
    kind = "cosine" if isinstance(loaded, LoadedClip) else "logit"
    return Case(
        image=to_display_image(explained.pixels, loaded).numpy(),
        phrases=item.phrases,
        heat={method: heat.numpy() for method, heat in explained.heat.items()},
        caption=item.caption,
        source=item.file.name,
        scores=[f"{kind} {value:.3f}".replace("-", "−") for value in explained.score.tolist()],
        sentences=sentences,
    )


def _write(folder: Path, case: Case, explained: Explained) -> None:
    """Overlays, arrays and the values of words of one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    names = slugs(case.phrases)
    for method, maps in case.heat.items():
        for name, heat in zip(names, maps, strict=True):
            Image.fromarray(overlay(case.image, heat)).save(folder / f"{name}-{slug(method)}.png")
    arrays: dict[str, Any] = {"phrases": np.array(list(case.phrases)), **case.heat}
    np.savez_compressed(folder / MAPS, score=explained.score.numpy(), **arrays)
    read = [one for one in case.sentences if one.values and one.words]
    lines = [{"words": list(o.words), "cut": o.cut, "values": dict(o.values)} for o in read]
    (folder / SENTENCES).write_text(json.dumps(lines, ensure_ascii=False, indent=1), "utf-8")


def _page(cfg: DictConfig, loaded: Loaded, cases: Sequence[Case], out: Path) -> Path:
    """The page, and the sheet of all maps if one is asked for."""
    methods = [name for name in cases[0].heat if all(name in case.heat for case in cases)]
    settings = {
        "model": loaded.name,
        "weights": str(cfg.run or loaded.weights or "its own"),
        "hash of weights": loaded.weights_hash[:16],
        "prompt": str(cfg.prompt),
        "geometry": f"aspect, shorter side at most {cfg.shortest} pixels"
        if cfg.geometry == "aspect"
        else f"model, {loaded.image_size[1]} x {loaded.image_size[0]} pixels",
    }
    if cfg.per_head:
        settings["heads"] = "Grad-ECLIP's defaults with heads=all, one head each"
    words = {name for case in cases for one in case.sentences for name in one.values}
    facts = {
        "Settings": settings,
        "Methods": {
            name: _settings(cfg.explainer[name]) for name in cfg.explainer if name in methods
        },
        "Words": {name: _settings(cfg.words[name]) for name in cfg.words if name in words},
        "Versions": versions(),
    }
    page = Page(
        title="What the match is made of",
        intro="Where a picture matches a phrase, and which words make it match.",
        methods=methods,
        first=methods[0],
        kind="Method",
        cases=cases,
        facts={heading: listed for heading, listed in facts.items() if listed},
    )
    if cfg.picture is not None:
        draw_still(cases, methods, Path(cfg.picture), columns=24, each=3)
    return write_page(page, out / PAGE)


def _settings(node: DictConfig) -> str:
    pairs = [(str(key), value) for key, value in node.items() if key not in HIDDEN]
    return ", ".join(f"{key} {value}" for key, value in pairs) or "no settings"
