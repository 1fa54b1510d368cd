"""What `explain` is asked: pictures, and the phrases and sentences for each of them."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

if TYPE_CHECKING:
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
    from gradeclip_ft.text.phrases import Phrases
    from gradeclip_ft.text.taggers import load_tagger, prepare_tagger

    parse = Phrases(load_tagger(prepare_tagger("auto")), max_phrases=10)
    found = [parse(caption) for caption in captions]
    for caption, phrases in zip(captions, found, strict=True):
        if not phrases:
            raise ValueError(f"no phrase with a noun in {caption!r}; give phrases=[...]")
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | ListConfig) else [value]
