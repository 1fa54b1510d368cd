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
from omegaconf import DictConfig, ListConfig
from PIL import Image
from torch import Tensor

from gradeclip_ft.commands.build import build_run, make
from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import (
    Explained,
    Seen,
    Supported,
    explain_pictures,
    explain_sentences,
    see,
    targets_of,
    warn_of_unread,
)
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.page import case_of, explanation_page, in_words
from gradeclip_ft.images import IMAGE_SUFFIXES, ImageError, images_in
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.other.classifier import LoadedImageModel as Loaded
from gradeclip_ft.report.content import Case, Words
from gradeclip_ft.report.figures import draw_still, overlay
from gradeclip_ft.report.page import write_page
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger, prepare_tagger
from gradeclip_ft.text.prompts import phrase_prompt

AT_A_TIME = 8  # pictures
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
    word_methods: dict[str, Explainer] = {}
    if isinstance(loaded, LoadedClip):
        warn_of_unread(loaded, [text for one in inputs for text in [*one.sentences, *one.prompted]])
        word_methods = {
            str(name): make(cfg.words[name], "words") for name in cfg.explainer if name in cfg.words
        }
    words = word_methods
    explainers = {str(name): make(node, "explainer") for name, node in cfg.explainer.items()}
    count = loaded.image_model.image.heads if cfg.per_head else 0
    heads = {f"head {head}": GradEclip(heads="all", head=head) for head in range(count)}
    supported = Supported(explainers | heads, loaded, skip=len(explainers) > 1)
    out, cases = Path(cfg.out), []
    portions = [inputs[at : at + AT_A_TIME] for at in range(0, len(inputs), AT_A_TIME)]
    for portion in progress_bar(portions, "explaining", len(portions)):
        some: list[ExplainInput] = []
        seen: list[Seen] = []
        for item in portion:
            try:
                seen.append(see(loaded, item.file, cfg.geometry, cfg.shortest))
                some.append(item)
            except (ImageError, FileNotFoundError) as error:  # broken, or a dangling link
                if len(inputs) == 1:
                    raise
                log.warning("left out: %s", error)
        targets = [_targets(loaded, item) for item in some]
        found = explain_pictures(loaded, seen, targets, supported)
        read = _sentences(loaded, some, found, words)
        for item, explained, sentences in zip(some, found, read, strict=True):
            case = case_of(
                loaded,
                explained,
                item.phrases,
                source=item.file.name,
                caption=item.caption,
                sentences=sentences,
            )
            _write(out / item.folder, case, explained)
            cases.append(case)
            words = {name: words[name] for one in sentences[:1] for name in one.values}
    if not cases:
        raise ValueError(f"none of the {len(inputs)} pictures can be read")
    settings = {
        **({"weights": str(cfg.run)} if cfg.run else {}),
        "prompt": str(cfg.prompt),
        "geometry": in_words(loaded, cfg.geometry, cfg.shortest),
        **({"heads": "Grad-ECLIP's defaults with heads=all, one head each"} if heads else {}),
    }
    page = explanation_page(loaded, cases, settings, explainers, word_methods)
    if cfg.picture is not None:
        draw_still(cases, page.methods, Path(cfg.picture), columns=None, each=None)
    print(write_page(page, out / PAGE))


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
        if not found and os.path.isdir(name) and (below := images_in(Path(name), below=True)):
            raise FileNotFoundError(
                f"images={name}: the pictures are in folders below ({len(below)}); write "
                f"images='{name}/**/*{below[0].suffix}'"
            )
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


def _load(cfg: DictConfig) -> Loaded:
    if cfg.run is not None:
        return build_run(cfg.run, cfg.runs_dir)
    loaded: Loaded = make(cfg.model, "model")
    return loaded


def _targets(loaded: Loaded, item: ExplainInput) -> Tensor:
    is_clip = isinstance(loaded, LoadedClip)
    if item.caption and not is_clip:
        raise ValueError(
            f"{loaded.name} knows classes, not captions; give class names as phrases=[...]"
        )
    return targets_of(loaded, item.prompted if is_clip else item.phrases)


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
