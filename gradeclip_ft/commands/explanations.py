"""What `explain` leaves: overlays, arrays, coloured captions, one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gradeclip_ft.commands.questions import slug, slugs
from gradeclip_ft.explain.pictures import Explained, shown
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.report.content import Case, Page, Words
from gradeclip_ft.report.figures import overlay
from gradeclip_ft.report.page import render
from gradeclip_ft.report.still import draw_still
from gradeclip_ft.report.words import draw_words
from gradeclip_ft.results.fingerprint import versions

if TYPE_CHECKING:
    from gradeclip_ft.commands.explain import Loaded
    from gradeclip_ft.commands.questions import Question
    from gradeclip_ft.explain.sentences import Sentence

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
