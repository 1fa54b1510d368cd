"""Images per second of the training loader, beside webdataset and open_clip's transform alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset
from open_clip.transform import image_transform

from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.data.make_shards import add_phrases, write_shard
from gradeclip_ft.data.shards import Skips, read_shard
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

from .clock import cpu_seconds, in_turns
from .inputs import PHOTOS, read_pairs, tagger_name
from .publish import Section, publish

SHARDS = PHOTOS.parent / "flickr_photos"


def loader(
    *,
    shards: str | None = None,
    model: str = "ViT-B-16",
    batch_size: int = 64,
    limit: int = 320,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """One worker's work without the worker: decode, crop, captions, phrases, tokens, batches."""
    torch.set_num_threads(1)
    loaded = load_clip(model, "random")
    with tempfile.TemporaryDirectory() as folder:
        plain, ahead, source = _shards(shards, limit, Path(folder))
        ours = partial(_ours, loaded, batch_size)
        bare = "webdataset decode, open_clip transform"
        size = loaded.image_size[0]
        variants: dict[str, Callable[[], object]] = {
            bare: partial(_bare, plain, size, True),
            "the same, resize and crop in the centre": partial(_bare, plain, size, False),
            "ours, no phrases": partial(ours, plain, 0),
            "ours, phrases found by the worker": partial(ours, plain, 5),
            "ours, phrases computed ahead": partial(ours, ahead, 5),
        }
        turns = in_turns(variants, rounds=rounds, now=cpu_seconds)
    images = limit // batch_size * batch_size
    counts = {name: limit if name.startswith(("web", "the")) else images for name in variants}
    rows: dict[str, dict[str, float | str]] = {}
    for name in variants:
        share = counts[name] / counts[bare]
        rows[name] = {
            "images/s": counts[name] / turns.median(name),
            "throughput / bare": share / turns.ratio(name, bare),
        }
    notes = [
        f"{source}, batches of {batch_size}; tagger {tagger_name()}; CPU seconds of one process; "
        f"medians over {rounds} rounds in turns behind one of warm-up.",
        "open_clip's transform for training is RandomResizedCrop; ours resizes the shortest side "
        "and crops at random.",
    ]
    publish(Section(f"loader, {model}", rows, notes), out, threads=1)


def _shards(given: str | None, limit: int, folder: Path) -> tuple[Path, Path, str]:
    """One shard of `limit` samples, and the same with phrases computed ahead."""
    plain, ahead = folder / "plain.tar", folder / "ahead" / "plain.tar"
    ahead.parent.mkdir()
    urls = [given] if given else sorted(map(str, SHARDS.glob("*.tar")))
    samples = [sample for url in urls for sample in read_shard(url, Skips())]
    source = f"{limit} photos of {Path(urls[0]).parent.name}" if urls else "written samples"
    samples = [_without_phrases(sample) for sample in samples or _written()]
    chosen = [
        {**samples[number % len(samples)], "__key__": f"{number:06d}"} for number in range(limit)
    ]
    write_shard(plain, chosen)
    add_phrases(str(plain), ahead.parent, tagger=tagger_name(), max_phrases=20)
    return plain, ahead, source


def _without_phrases(sample: dict[str, Any]) -> dict[str, Any]:
    """Image and caption of the first sentence."""
    suffix = next(key for key in ("jpg", "jpeg", "png") if key in sample)
    return {suffix: sample[suffix], "txt": sample["txt"]}


def _written() -> list[dict[str, Any]]:
    from io import BytesIO

    samples = []
    for pair in read_pairs(0)[0]:
        content = BytesIO()
        pair.image.save(content, "JPEG", quality=90)
        samples.append({"jpg": content.getvalue(), "txt": pair.captions[0].encode()})
    return samples


def _bare(shard: Path, size: int, train: bool) -> int:
    transform = image_transform(size, is_train=train)
    data = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    pairs = data.decode("pilrgb").rename(image="jpg;jpeg;png").map_dict(image=transform)
    return sum(1 for _ in pairs)


def _ours(loaded: LoadedClip, batch_size: int, shard: Path, phrases: int) -> int:
    source = CaptionTrainData(
        shards=str(shard),
        batch_size=batch_size,
        tokenizer=loaded.tokenizer,
        transform=loaded.transform(train=True),
        workers=0,
        resampled=False,
        shuffle=0,
        max_phrases=phrases,
    )
    return sum(1 for _ in source.loader(seed=0, epoch=0, rank=0, world_size=1))
