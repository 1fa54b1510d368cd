"""`detect`: pictures and words to boxes with names and scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import build_clip
from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.commands.explain import listed, picture_files, slugs
from gradeclip_ft.data.detection import Placing, join_placed
from gradeclip_ft.detection.detector import Detector, Vocabulary
from gradeclip_ft.detection.evaluator import require_detector
from gradeclip_ft.images import ImageError, read_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.report.detections import Found, FoundBox, draw, write_found
from gradeclip_ft.results.record import versions, write_atomically

JSON, PAGE = "detections.json", "index.html"
log = logging.getLogger(__name__)


def detect(cfg: DictConfig) -> None:
    """Find things in pictures by their names, with a detector that `train` made.

    Any words will do: names that no box was annotated for are found by what the frozen model says
    about a place. Writes detections.json (COCO's form: images, categories, and annotations with
    bbox and score), a picture with boxes for each picture, and one page with all of them.

    python -m gradeclip_ft detect run=detector_shapes images=data/shapes/images_val
    python -m gradeclip_ft detect run=my_detector images='photos/*.jpg' names=[dog,'red car']
    """
    files = list(picture_files(cfg.images))
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    home = weights.parent
    start = {"model": runs.read_config(home).model, "init_from": str(weights)}
    loaded = build_clip(OmegaConf.create({**start, "runs_dir": cfg.runs_dir}))
    detector = require_detector(loaded, "detect")
    detector.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vocabulary = _vocabulary(cfg, detector, home)
    out = Path(cfg.out)
    found: list[Found] = []
    for file, name in progress_bar(
        list(zip(files, slugs([file.stem for file in files]), strict=True)), "looking", len(files)
    ):
        try:
            image = read_image(file)
        except (ImageError, FileNotFoundError) as error:  # broken, or a dangling link
            if len(files) == 1:
                raise
            log.warning("left out: %s", error)
            continue
        boxes = _look(loaded, detector, image, vocabulary, cfg.least_score)
        found.append(Found(file.name, np.asarray(image), boxes))
        path = out / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(found[-1]).save(path)
    if not found:
        raise ValueError(f"none of the {len(files)} pictures can be read")
    write_atomically(out / JSON, json.dumps(_coco(found, vocabulary.names)) + "\n")
    base = [n for n, known in zip(vocabulary.names, vocabulary.is_base, strict=True) if known]
    settings = {
        "run": home.name,
        "model": loaded.name,
        "hash of weights": loaded.weights_hash[:16],
        "names": ", ".join(vocabulary.names),
        "of these annotated in training": ", ".join(base) or "none",
        "least score": str(cfg.least_score),
        "side": f"{detector.settings.side} pixels",
    }
    print(out / JSON)
    print(write_found(found, out / PAGE, {"Settings": settings, "Versions": dict(versions())}))


def _vocabulary(cfg: DictConfig, detector: Detector, home: Path) -> Vocabulary:
    """What to look for, and which of it the detector learned from."""
    facts = runs.read_environment(home).get("data") or {}
    known = [*facts.get("base", []), *facts.get("novel", [])]
    if cfg.names is None and not known:
        raise ValueError(
            f"{home} does not say which classes it learned; give names=[dog,'red car']"
        )
    names = known if cfg.names is None else listed("names", cfg.names)
    return detector.vocabulary(
        names, facts.get("base", []) if cfg.base is None else listed("base", cfg.base)
    )


def _look(
    loaded: LoadedClip,
    detector: Detector,
    image: Image.Image,
    vocabulary: Vocabulary,
    least_score: float,
) -> list[FoundBox]:
    """Boxes of one picture, in pixels of it."""
    placing = Placing(detector.settings.side, loaded.mean, loaded.std)
    nothing = torch.zeros(0, dtype=torch.long)
    placed = placing(image, torch.zeros(0, 4), nothing, "")
    batch = join_placed([placed]).to(detector.device)
    (found,) = detector.detect(batch.images, batch.sizes, vocabulary)
    rows = zip(
        (found.boxes / placed.scale).tolist(),
        found.scores.tolist(),
        found.labels.tolist(),
        strict=True,
    )
    return [
        FoundBox(vocabulary.names[label], score, (x0, y0, x1, y1))
        for (x0, y0, x1, y1), score, label in rows
        if score >= least_score
    ]


def _coco(found: Sequence[Found], names: Sequence[str]) -> dict[str, Any]:
    """COCO's form; category ids follow the names from 1."""
    images = [
        {"id": row, "file_name": each.name, "height": len(each.image), "width": each.image.shape[1]}
        for row, each in enumerate(found, start=1)
    ]
    boxes = [(row, box) for row, each in enumerate(found, start=1) for box in each.boxes]
    annotations = []
    for number, (row, box) in enumerate(boxes, start=1):
        x0, y0, x1, y1 = box.box
        annotations.append(
            {
                "id": number,
                "image_id": row,
                "category_id": names.index(box.name) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": box.score,
            }
        )
    categories = [{"id": row, "name": name} for row, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
