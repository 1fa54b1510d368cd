"""`explain`: pictures and phrases to heat maps, on one page."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.compose import conf_dir, options
from gradeclip_ft.commands.names import suggest

if TYPE_CHECKING:
    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.explain.pictures import Explained
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.report.content import Case

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ALL, PAGE = "all", "index.html"
NOT_HERE = ("grad_eclip_text", "uniform")  # for sentences; the same weight everywhere


def explain(cfg: DictConfig) -> None:
    """Show which pixels make a picture match a phrase, by one or several methods.

    Writes one page without outside references (choose a phrase, compare methods), an overlay of
    every map as PNG, and the maps as arrays. Every method sees the same pixels and text vectors.

    python -m gradeclip_ft explain images=dog.jpg phrases=[dog,grass] model=openai_b16
    python -m gradeclip_ft explain images='photos/*.jpg' captions=['a dog on the grass'] run=try
    python -m gradeclip_ft explain images=photos phrases=[dog] explainer=all out=maps
    """
    files = list(_files(cfg.images))
    methods = _methods(cfg.methods)
    phrases = _phrases(cfg, len(files))
    import torch

    from gradeclip_ft.data.files import open_image
    from gradeclip_ft.explain.pictures import explain_picture, prepared
    from gradeclip_ft.text.prompts import phrase_prompt

    loaded = _load(cfg)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded.clip.to(device)
    chosen = prepared(methods, loaded)
    out, cases = Path(cfg.out), []
    for file, words in zip(files, phrases, strict=True):
        target = loaded.encode_texts([phrase_prompt(cfg.prompt, word) for word in words])
        explained = explain_picture(
            loaded,
            open_image(file),
            target,
            chosen,
            geometry=cfg.geometry,
            longest=cfg.longest,
            skip=ALL in _listed(cfg.methods),
        )
        cases.append(_case(loaded, explained, words, file.name))
        _write(out / _slug(file.stem), cases[-1], explained)
    print(_page(cfg, loaded, cases, out / PAGE))


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


def _methods(asked: Any) -> dict[str, Explainer]:
    """Methods by name, built from their yaml.

    Raises:
        ValueError: There is none of this name.
    """
    from hydra.utils import instantiate

    known = [name for name in options("explainer") if name not in NOT_HERE]
    names = _listed(asked)
    names = known if ALL in names else names
    for name in names:
        if name not in known:
            raise ValueError(f"explainer={name}: there is no such method; {suggest(name, known)}")
    return {
        name: instantiate(
            OmegaConf.load(conf_dir() / "explainer" / f"{name}.yaml"), _convert_="all"
        )
        for name in names
    }


def _phrases(cfg: DictConfig, count: int) -> list[list[str]]:
    """Phrases of every picture: given, or found in captions."""
    from gradeclip_ft.explain.pictures import check_phrases

    if (cfg.phrases is None) == (cfg.captions is None):
        raise ValueError("give phrases=[dog,'red car'], or captions=['a dog beside a red car']")
    if cfg.phrases is not None:
        words = [str(phrase) for phrase in _listed(cfg.phrases)]
        check_phrases(words)
        return [words] * count
    from gradeclip_ft.text.phrases import Phrases
    from gradeclip_ft.text.taggers import load_tagger, prepare_tagger

    captions = [str(caption) for caption in _listed(cfg.captions)]
    if len(captions) not in (1, count):
        raise ValueError(
            f"{len(captions)} captions for {count} pictures; give one for all, or one for each"
        )
    parse = Phrases(load_tagger(prepare_tagger("auto")), max_phrases=10)
    found = [parse(caption) for caption in captions]
    for caption, words in zip(captions, found, strict=True):
        if not words:
            raise ValueError(f"no phrase with a noun in {caption!r}; give phrases=[...]")
    return found * count if len(found) == 1 else found


def _load(cfg: DictConfig) -> LoadedClip:
    from gradeclip_ft.commands.build import build_clip

    if cfg.run is None:
        return build_clip(OmegaConf.create({"model": cfg.model, "runs_dir": cfg.runs_dir}))
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    model = runs.read_config(weights.parent).model
    start = {"model": model, "runs_dir": cfg.runs_dir, "init_from": str(weights)}
    return build_clip(OmegaConf.create(start))


def _case(loaded: LoadedClip, explained: Explained, words: list[str], name: str) -> Case:
    from gradeclip_ft.explain.pictures import shown
    from gradeclip_ft.report.content import Case

    score = [f"{value:.3f}".replace("-", "−") for value in explained.score.tolist()]
    return Case(
        image=shown(explained.pixels, loaded).numpy(),
        phrases=words,
        heat={method: heat.numpy() for method, heat in explained.heat.items()},
        caption=name,
        values={"cosine": dict.fromkeys(explained.heat, score)},
    )


def _write(folder: Path, case: Case, explained: Explained) -> None:
    """Overlays and arrays of one picture."""
    import numpy as np
    from PIL import Image

    from gradeclip_ft.report.figures import overlay

    folder.mkdir(parents=True, exist_ok=True)
    for method, maps in case.heat.items():
        for phrase, heat in zip(case.phrases, maps, strict=True):
            Image.fromarray(overlay(case.image, heat)).save(
                folder / f"{_slug(phrase)}-{method}.png"
            )
    arrays: dict[str, Any] = dict(case.heat)
    np.savez_compressed(
        folder / "maps.npz",
        phrases=np.array(list(case.phrases)),
        cosine=explained.score.numpy(),
        **arrays,
    )


def _page(cfg: DictConfig, loaded: LoadedClip, cases: Sequence[Case], path: Path) -> Path:
    from gradeclip_ft.report.content import Page
    from gradeclip_ft.report.page import render
    from gradeclip_ft.results.fingerprint import versions

    methods = [name for name in cases[0].heat if all(name in case.heat for case in cases)]
    first = "grad_eclip" if "grad_eclip" in methods else methods[0]
    methods = [*(name for name in methods if name != first), first]  # the page opens on the last
    settings = {
        "model": loaded.name,
        "weights": str(cfg.run or loaded.weights or "its own"),
        "prompt": str(cfg.prompt),
        "geometry": str(cfg.geometry),
    }
    page = Page(
        title="What the match is made of",
        intro="Where a picture matches a phrase, by every method; each map on a scale of its own.",
        methods=methods,
        kind="Method",
        cases=cases,
        facts={"Settings": settings, "Versions": dict(versions())},
    )
    return render(page, path)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | ListConfig) else [value]


def _slug(text: str) -> str:
    """A file name of a text: letters and digits, the rest as dashes."""
    return re.sub(r"[^\w]+", "-", text).strip("-")[:60] or "phrase"
