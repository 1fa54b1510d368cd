"""What things cost: `python -m tools.bench ACTION [key=value ...]`; `out=results/speed` keeps it.

Every action prints a table with the machine, the threads and the versions.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import torch
import webdataset
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from gradeclip_ft.commands.cli import call, usage
from gradeclip_ft.commands.config import perform, wants_traceback
from gradeclip_ft.data.captions import (
    CaptionData,
    CaptionTrainData,
    caption_phrases,
    phrase_entry,
)
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.data.make_shards import add_phrases, write_shard
from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.data.photos import PhotoTrainData
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.data.segmentation import LabelFolder, Resize
from gradeclip_ft.data.shards import Skips, read_shard
from gradeclip_ft.evaluators.base import evaluating
from gradeclip_ft.evaluators.faithfulness import FaithfulnessEvaluator
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.evaluators.segmentation import Cut, SegmentationEvaluator, Segmenter
from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.images import images_in, read_image
from gradeclip_ft.models.clip import class_embeddings
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.ops.heatmap import owned_products, pool_heatmap
from gradeclip_ft.results.record import commit, versions
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger
from tools.measure import (
    GRAD_ECLIP,
    LISTING,
    NAMES,
    OPEN_CLIP,
    PHOTOS,
    PROMPT,
    RATIOS,
    SHARDS,
    Rows,
    cpu_steps,
    in_turns,
    published_heat,
    read_pairs,
    table,
    tagger_name,
)

INTRODUCTION = """# Speed

Every section is printed by the command above its table; the JSON file holds the same numbers. CPU
seconds are those of the process itself, one thread, so that other programs on the machine do not
enter; variants run in turns, ratios are medians over the rounds' own ratios.
"""


def publish(title: str, rows: Rows, notes: Sequence[str], out: Path | None) -> None:
    """Print a table; with `out`, enter it into OUT.json in place of its title, and write OUT.md."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = names[0] if names else platform.machine()
    entry = {
        "title": title,
        "rows": rows,
        "notes": list(notes),
        "command": f"python -m tools.bench {shlex.join(sys.argv[1:])}",
        "machine": f"{machine}, one thread, {platform.system()}",
        "versions": {**versions(), "torch": torch.__version__},
        "commit": commit(),
    }
    print(section(entry))
    if out is None:
        return
    path = out.with_suffix(".json")
    sections = json.loads(path.read_text()) if path.is_file() else []
    sections = [old for old in sections if old["title"] != title] + [entry]
    sections.sort(key=lambda section: str(section["title"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    out.with_suffix(".md").write_text("\n".join([INTRODUCTION, *map(section, sections)]))


def section(entry: Mapping[str, Any]) -> str:
    """An entry in Markdown."""
    rows = [{"": name, **row} for name, row in entry["rows"].items()]
    packages = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    facts = [*entry["notes"], f"{entry['machine']}; {packages}; commit {entry['commit']}."]
    head = f"## {entry['title']}\n\n```bash\n{entry['command']}\n```\n\n"
    return head + table(rows) + "\n" + "".join(f"- {fact}\n" for fact in facts)


def step(
    *,
    model: str = "ViT-B-16",
    batch_size: int = 8,
    phrases: int = 3,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Forward, backward and optimiser of one batch: open_clip's way, and ours in four ways."""
    variants, note = cpu_steps(model)
    rows = in_turns(variants(batch_size, phrases), rounds).rows(RATIOS)
    notes = [f"Batch of {batch_size}, {phrases} phrases per caption; {rounds} rounds.", note]
    publish(f"step, {model}, cpu", rows, notes, out)


def scaling(*, model: str = "ViT-B-16", rounds: int = 7, out: Path | None = None) -> None:
    """The Grad-ECLIP step against phrases per caption at batch 8, and against the batch."""
    variants, note = cpu_steps(model)
    points = {f"{count} phrases": (8, count) for count in (0, 1, 3, 5, 10)}
    points |= {f"batch {size}, 3 phrases": (size, 3) for size in (4, 16)}
    turns = in_turns({name: variants(*at)[GRAD_ECLIP] for name, at in points.items()}, rounds)
    rows: Rows = {}
    for name, (size, _) in points.items():
        ratio, spread = turns.against(name, "1 phrases")
        rows[name] = {"seconds": turns.median(name), "per image": turns.median(name) / size}
        rows[name] |= {"against 1 phrase": ratio, "rounds": spread}
    publish(f"scaling, {model}, cpu", rows, [f"{rounds} rounds.", note], out)


def memory(
    *,
    model: str = "ViT-B-16",
    batch_size: int = 8,
    phrases: int = 3,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Most memory that two steps take, each variant in a process of its own."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in rounds * NAMES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[name].append(pool.submit(peak, model, name, batch_size, phrases).result())
    base = statistics.median(found[OPEN_CLIP])
    rows: Rows = {
        name: {
            "peak GiB": statistics.median(values),
            "against open_clip": statistics.median(values) / base,
            "processes": ", ".join(f"{each:.2f}" for each in values),
        }
        for name, values in found.items()
    }
    notes = [f"Batch of {batch_size}, {phrases} phrases per caption; median of the processes."]
    publish(f"memory, {model}, cpu", rows, notes, out)


def peak(model: str, name: str, size: int, phrases: int) -> float:
    """GiB; runs in a process that does nothing else."""
    run = cpu_steps(model)[0](size, phrases)[name]
    for _ in range(2):  # the second one has the optimiser's state
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# Explanations, evaluations, loading, phrases and starting, beside other programs.

FEW, MANY, IMAGES = 10, 64, 8
PAIRS, PHRASES = "loop over 8 x 10 pairs", "loop over 10 phrases, for 8 images"
EXPLAINED = (
    ("map, 1 image, 10 embeddings", "encode_image, 1 image"),
    ("maps, 1 image, 10 phrases", "encoders, 1 image, 10 phrases"),
    ("maps, 1 image, 64 phrases", "encoders, 1 image, 64 phrases"),
    (PAIRS, "maps, 8 images x 10 phrases"),
    (PHRASES, "maps, 8 images x 10 phrases"),
)


def explain(*, model: str = "ViT-B-16", rounds: int = 7, out: Path | None = None) -> None:
    """Grad-ECLIP on one image and on eight, beside encode_image, encode_text and a pair loop."""
    torch.set_num_threads(1)
    loaded = load_clip(model, "random")
    clip, native = loaded.clip, loaded.require_clip("timed")
    library: Any = native.model
    pairs, source = read_pairs(5)
    texts = list(dict.fromkeys(PROMPT.format(text) for pair in pairs for text in pair.phrases))
    pixels = loaded.pixels([pair.image for pair in pairs[:IMAGES]])

    @torch.no_grad()
    def encode(count: int) -> None:
        library.encode_image(pixels[:1])
        if count:
            library.encode_text(loaded.tokenizer(texts[:count]))

    def maps(images: int, count: int, *, given: bool = False) -> Tensor:
        with torch.no_grad():
            ids = loaded.tokenizer(texts[:count], trim=True)
            target = torch.randn(count, 512) if given else clip.text.encode(ids)
        owner = torch.arange(images).repeat_interleave(count)
        return explain_image(GradEclip(), clip, pixels[:images], target.repeat(images, 1), owner)

    def loop(ids: Tensor, size: int) -> None:
        """The authors' way: native text, image up to the last block, then block and gradients."""
        for rows in torch.split(ids, size):
            with torch.no_grad():
                target = library.encode_text(rows)
                opened = native.image.open(pixels[:1])
                tokens = opened.run(opened.tokens, 0, len(opened.layers) - 1)
            published_heat(opened, tokens, target, torch.zeros(len(rows), dtype=torch.long))

    ids = loaded.tokenizer(texts[:FEW])
    variants: dict[str, Callable[[], object]] = {
        "encode_image, 1 image": partial(encode, 0),
        "encoders, 1 image, 10 phrases": partial(encode, FEW),
        "map, 1 image, 10 embeddings": partial(maps, 1, FEW, given=True),
        "maps, 1 image, 10 phrases": partial(maps, 1, FEW),
        "encoders, 1 image, 64 phrases": partial(encode, MANY),
        "maps, 1 image, 64 phrases": partial(maps, 1, MANY),
        "maps, 8 images x 10 phrases": partial(maps, IMAGES, FEW),
        PAIRS: partial(loop, ids, 1),
        PHRASES: partial(loop, ids, FEW),
    }
    turns = in_turns(variants, rounds)
    for name in (PAIRS, PHRASES):
        turns[name] = [IMAGES * seconds for seconds in turns[name]]
    notes = [
        f"{source}; medians over {rounds} rounds in turns after one of warm-up.",
        "encoders: open_clip's encode_image and encode_text, texts of 77 tokens, without a graph. "
        "maps: phrases of their own length are encoded, too.",
        "loop over pairs: both encoders, a full last block and a backward pass for every pair; "
        "loop over phrases: encoders once, a backward pass for every phrase. Both are timed on one "
        f"image and counted {IMAGES} times: every image costs the same.",
    ]
    publish(f"explain, {model}, cpu", turns.rows(EXPLAINED), notes, out)


def evaluate(
    *,
    annotations: Path = PHOTOS / "annotations" / "instances_val2017.json",
    images: Path = PHOTOS / "images",
    model: str = "ViT-B-16",
    image_size: int = 224,
    photos: int = 100,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """A region evaluation, photos loaded and decoded, beside the forward pass alone.

    The forward reads pixels from memory; the evaluation loads photos and masks, traces, pools and
    classifies. Class texts are encoded once per model, whatever the number of photos.
    """
    torch.set_num_threads(1)
    loaded, size = load_clip(model, "random"), 16
    data, sentence = (
        CocoRegions(str(annotations), str(images), limit=photos),
        ["a photo of the {}."],
    )
    regions = RegionEvaluator("bench", data, image_size, sentence, batch_size=size, workers=0)
    opened = data(image_size=image_size, patch=loaded.patch, mean=loaded.mean, std=loaded.std)
    pixels = [batch.images for batch in opened.batches(size, 0)]

    def forward() -> None:
        with evaluating(loaded.clip):
            for batch in pixels:
                loaded.clip.image.encode(batch)

    def texts() -> None:
        with evaluating(loaded.clip):
            class_embeddings(loaded.clip, loaded.tokenizer, opened.classes, sentence)

    names = ("encoder forward, pixels in memory", "evaluation", "class texts")
    calls: tuple[Callable[[], object], ...] = (forward, partial(regions, loaded), texts)
    turns = in_turns(dict(zip(names, calls, strict=True)), rounds)
    share = turns.against(names[1], names[0])[0] - turns.against(names[2], names[0])[0]
    rows = turns.rows() | {"evaluation without class texts / forward": {"ratio": share}}
    notes = [
        f"{len(opened)} photos at {image_size} px, {opened.counts['things']} regions; medians over "
        f"{rounds} rounds in turns after one of warm-up."
    ]
    publish(f"evaluate, {model}, cpu", rows, notes, out)


def segment(
    *,
    images: Path = PHOTOS / "images",
    model: str = "ViT-B-16",
    photos: int = 4,
    classes: int = 171,
    many: int = 5000,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """A segmentation evaluation, photos loaded, beside the forward pass over the same windows.

    Windows of 224 of photos at 336 px, q-q + k-k attention, labels drawn at random. Then `many`
    small pictures of as many classes by the packaged CLIP: what memory the process took before and
    after.
    """
    torch.set_num_threads(1)
    random, words = np.random.default_rng(0), {f"class {n}": ["dog"] for n in range(classes)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = images_in(images)[:photos]
        for name in ("labels", "small", "small_labels"):
            (root / name).mkdir()
        for path in sources:
            shape = read_image(path).size[::-1]
            labels = random.integers(0, classes, shape, dtype=np.uint8)
            Image.fromarray(labels).save(root / "labels" / f"{path.stem}.png")
        for number in range(many):
            pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "small" / f"{number}.png")
            labels = random.integers(0, classes, (48, 64), dtype=np.uint8)
            Image.fromarray(labels).save(root / "small_labels" / f"{number}.png")
        data = LabelFolder(str(images), str(root / "labels"), words, "bench")
        method = Segmenter(dense="sclip", side=336, window=224, stride=112, templates=["{}"])
        whole = SegmentationEvaluator("bench", data, {"sclip": method}, batch_size=8, pictures=0)
        loaded = load_clip(model, "random")
        windows = [
            torch.stack(list(Cut.of(sample.pixels[Resize(336)], 224, 112, loaded.patch).windows))
            for batch in data().batches(
                [Resize(336)], loaded.mean, loaded.std, batch_size=1, workers=0
            )
            for sample in batch
        ]

        def forward() -> None:
            with evaluating(loaded.clip):
                for batch in windows:
                    loaded.clip.image.encode(batch)

        def texts() -> None:
            with evaluating(loaded.clip):
                names = [word for each in words.values() for word in each]
                class_embeddings(loaded.clip, loaded.tokenizer, names, ["{}"])

        names = ("encoder forward, windows in memory", "evaluation", "class texts")
        calls: tuple[Callable[[], object], ...] = (forward, partial(whole, loaded), texts)
        turns = in_turns(dict(zip(names, calls, strict=True)), rounds)
        share = turns.against(names[1], names[0])[0] - turns.against(names[2], names[0])[0]
        rows = turns.rows() | {"evaluation without class texts / forward": {"ratio": share}}
        small = str(root / "small"), str(root / "small_labels")
        few = LabelFolder(*small, words, "bench", image_suffix=".png", limit=100)
        tiny, plain = load_clip("shapes_tiny"), Segmenter(templates=["{}"])
        taken = []
        for source in (few, replace(few, limit=None)):
            SegmentationEvaluator("bench", source, {"value": plain}, pictures=0)(tiny)
            taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    rows |= {
        f"most memory after {photos} photos and 100 pictures": {"peak GiB": taken[0]},
        f"most memory after {many} pictures": {"peak GiB": taken[1]},
    }
    counted = sum(map(len, windows))
    notes = [
        f"{len(sources)} photos at 336 px, {counted} windows, {classes} classes; medians over "
        f"{rounds} rounds in turns after one of warm-up."
    ]
    publish(f"segment, {model}, cpu", rows, notes, out)


def faithfulness(
    *,
    captions: Path = PHOTOS / "annotations" / "captions_val2017.json",
    images: Path = PHOTOS / "images",
    model: str = "ViT-B-32",
    photos: int = 16,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Deletion and insertion of four last-layer methods, beside the passes over the changed photos.

    The forward reads as many pixels from memory as the evaluation changes: 10 photos of each kind
    for a method, and each photo untouched.
    """
    torch.set_num_threads(1)
    loaded, size = load_clip(model, "random"), 60
    methods: dict[str, Explainer] = {
        "grad_eclip": GradEclip(),
        "raw_attention": RawAttention(),
        "grad_cam": GradCam(),
        "maskclip": MaskClip(),
    }
    data = CaptionFile(str(captions), str(images), split="photos", limit=photos)
    changed = FaithfulnessEvaluator(
        "bench", data, methods, "cosine", include_zero=False, batch_size=size
    )
    count = photos * (1 + len(methods) * 20)
    pixels = torch.randn(size, 3, *loaded.image_size)

    def forward() -> None:
        with evaluating(loaded.clip):
            for start in range(0, count, size):
                loaded.clip.image.encode(pixels[: min(size, count - start)])

    names = ("forward over the changed photos", "evaluation")
    turns = in_turns(dict(zip(names, (forward, partial(changed, loaded)), strict=True)), rounds)
    notes = [
        f"{photos} photos, {count} changed ones; medians over {rounds} rounds in turns after one "
        "of warm-up. The evaluation also reads the photos and encodes them and their captions once."
    ]
    publish(f"faithfulness, {model}, cpu", turns.rows(), notes, out)


def pooling(
    *,
    images: int = 32,
    most: int = 5,
    tokens: int = 196,
    width: int = 512,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Regions and products, forward and backward, beside a copy of the image for each phrase."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, most + 1, (images,), generator=draw)
    owner = torch.arange(images).repeat_interleave(counts)
    side = round(math.sqrt(tokens))
    dense = torch.randn(images, side, side, width, generator=draw).requires_grad_()
    heat = torch.rand(len(owner), side, side, generator=draw).requires_grad_()
    vectors = torch.randn(len(owner), width, generator=draw).requires_grad_()
    rows = dense.flatten(1, 2)

    def ours() -> tuple[Tensor, Tensor]:
        pooled = pool_heatmap(dense, heat, owner, normalize_tokens=False, most=most)
        return pooled, owned_products(rows, vectors, owner, most=most)

    def copied() -> tuple[Tensor, Tensor]:
        pooled = torch.bmm(heat.flatten(1).unsqueeze(1), rows[owner]).squeeze(1)
        return pooled, torch.bmm(rows[owner], vectors.unsqueeze(2)).squeeze(2)

    def gradients(way: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        pooled, products = way()
        return torch.autograd.grad(pooled.sum() + products.sum(), (dense, heat, vectors))

    ways = {"side by side": ours, "copies": copied}
    turns = in_turns({name: partial(gradients, way) for name, way in ways.items()}, rounds)
    shown = turns.rows([("side by side", "copies")])
    for name, way in ways.items():
        kept: dict[int, int] = {}  # bytes that the graph holds, besides the inputs

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = way()
        for tensor in (dense, heat, vectors):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        del found
        shown[name]["MiB kept for the backward pass"] = sum(kept.values()) / 2**20
    pairs = zip((*ours(), *gradients(ours)), (*copied(), *gradients(copied)), strict=True)
    with torch.no_grad():
        apart = max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
    shown["largest relative difference, values and gradients"] = {"ratio": apart}
    notes = [
        f"{images} images of {side} x {side} tokens and {width} channels with 0 to {most} phrases, "
        f"{len(owner)} in all; fp32; {rounds} rounds in turns after a warm-up."
    ]
    publish("pooling, cpu", shown, notes, out)


def loader(*, model: str = "ViT-B-16", rounds: int = 7, out: Path | None = None) -> None:
    """One worker's work without the worker: decode, crop, captions, phrases, tokens, batches."""
    torch.set_num_threads(1)
    loaded, size, limit = load_clip(model, "random"), 64, 320

    def theirs(shard: Path, train: bool) -> int:
        transform = image_transform(loaded.image_size[0], is_train=train)
        data = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        pairs = data.decode("pilrgb").rename(image="jpg;jpeg;png").map_dict(image=transform)
        return sum(1 for _ in pairs)

    def ours(shard: Path, phrases: int) -> int:
        source = CaptionTrainData(
            shards=str(shard),
            batch_size=size,
            tokenizer=loaded.tokenizer,
            transform=loaded.transform(train=True),
            workers=0,
            resampled=False,
            shuffle=0,
            max_phrases=phrases,
        )
        return sum(1 for _ in source.loader(seed=0, epoch=0, rank=0, world_size=1))

    with tempfile.TemporaryDirectory() as folder:
        plain, ahead, source = two_shards(limit, Path(folder))
        bare = "webdataset decode, open_clip transform"
        variants: dict[str, Callable[[], object]] = {
            bare: partial(theirs, plain, True),
            "the same, resize and crop in the centre": partial(theirs, plain, False),
            "ours, no phrases": partial(ours, plain, 0),
            "ours, phrases found by the worker": partial(ours, plain, 5),
            "ours, phrases computed ahead": partial(ours, ahead, 5),
        }
        turns = in_turns(variants, rounds)
    rows: Rows = {
        name: {
            "images/s": limit / turns.median(name),
            "throughput / bare": 1 / turns.against(name, bare)[0],
        }
        for name in variants
    }
    notes = [
        f"{source}, batches of {size}; tagger {tagger_name()}; CPU seconds of one process; medians "
        f"over {rounds} rounds in turns after one of warm-up.",
        "open_clip's transform for training is RandomResizedCrop; ours resizes the shortest side "
        "and crops at random.",
    ]
    publish(f"loader, {model}", rows, notes, out)


def photos(*, model: str = "ViT-B-32", rounds: int = 7, out: Path | None = None) -> None:
    """Photos that a table lists, read as files, against the same photos in a shard."""
    torch.set_num_threads(1)
    loaded, size, limit = load_clip(model, "random"), 64, 320
    given: dict[str, Any] = {
        "batch_size": size,
        "tokenizer": loaded.tokenizer,
        "transform": loaded.transform(train=True),
        "workers": 0,
    }

    def read(data: CaptionData) -> int:
        return sum(1 for _ in data.loader(seed=0, epoch=0, rank=0, world_size=1))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard, _, source = two_shards(limit, folder)
        lines = ["file,caption"]
        for sample in read_shard(str(shard), Skips(), wanted=("jpg", "txt")):
            file = f"{sample['__key__']}.jpg"
            (folder / file).write_bytes(sample["jpg"])
            caption = sample["txt"].decode().strip().replace('"', "'")
            lines.append(f'{file},"{caption}"')
        table = folder / "photos.csv"
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        shards = CaptionTrainData(shards=str(shard), resampled=False, shuffle=0, **given)
        files = PhotoTrainData(table=str(table), holdout=0, **given)
        turns = in_turns({"shard": partial(read, shards), "table": partial(read, files)}, rounds)
    ratio, spread = turns.against("shard", "table")
    rows: Rows = {name: {"photos/s": limit / turns.median(name)} for name in turns}
    rows["table"] |= {"throughput / shard": ratio, "rounds": spread}
    notes = [
        f"{source} on a local disk, with phrases; batches of {size}; CPU seconds of one process, "
        f"opening files included; medians over {rounds} rounds in turns after one of warm-up."
    ]
    publish(f"photos, {model}", rows, notes, out)


def two_shards(limit: int, folder: Path) -> tuple[Path, Path, str]:
    """One shard of `limit` samples, and the same with phrases computed ahead."""
    plain, ahead = folder / "plain.tar", folder / "ahead" / "plain.tar"
    ahead.parent.mkdir()
    urls = sorted(map(str, SHARDS.glob("*.tar")))
    found = (sample for url in urls for sample in read_shard(url, Skips(), wanted=("jpg", "txt")))
    samples = [{"jpg": sample["jpg"], "txt": sample["txt"]} for sample in found]
    source = f"{limit} photos of {SHARDS.name}" if samples else "written samples"
    for pair in () if samples else read_pairs(0)[0]:
        content = BytesIO()
        pair.image.save(content, "JPEG", quality=90)
        samples.append({"jpg": content.getvalue(), "txt": pair.captions[0].encode()})
    rows = [{**samples[n % len(samples)], "__key__": f"{n:06d}"} for n in range(limit)]
    write_shard(plain, rows)
    add_phrases(str(plain), ahead.parent, tagger=tagger_name(), max_phrases=20)
    return plain, ahead, source


def phrases(*, rounds: int = 7, out: Path | None = None) -> None:
    """Phrases by each tagger, by lookup, and by NLTK's own functions one after the other."""
    rows = read_captions(LISTING) if LISTING.is_file() else read_pairs(0)[0]
    texts = [caption for entry in rows for caption in entry.captions][:2000]
    grammar = nltk.RegexpParser("NP: {<JJ.*>*<NN.*>+}")

    def tags(text: str) -> Any:
        return nltk.pos_tag(nltk.NLTKWordTokenizer().tokenize(text.lower()))

    def plain(text: str) -> list[str]:
        """What NLTK's documentation shows."""
        parts = grammar.parse(tags(text)).subtrees()
        found = (" ".join(word for word, _ in part) for part in parts if part.label() == "NP")
        return list(dict.fromkeys(found))

    functions: dict[str, Callable[[str], object]] = {}
    if tagger_name() == "nltk":
        functions["nltk.pos_tag and RegexpParser, plain loop"] = plain
        functions["nltk.pos_tag alone, plain loop"] = tags
    for name in dict.fromkeys((tagger_name(), "textblob")):
        finder = PhraseFinder(load_tagger(name), 5)
        functions[f"ours, {name}"] = finder
        record = {"phrases": phrase_entry(texts, finder)}
        stored = partial(caption_phrases, record, find=finder)
        functions[f"ours, {name}, computed ahead"] = stored

    def each(find: Callable[[str], object]) -> None:
        for text in texts:
            find(text)

    turns = in_turns({name: partial(each, find) for name, find in functions.items()}, rounds)
    base, shown = next(iter(turns)), dict[str, dict[str, Any]]()
    for name in turns:
        faster, spread = turns.against(base, name)
        shown[name] = {"captions/s": len(texts) / turns.median(name)}
        shown[name] |= {"faster than the first row": faster, "rounds": spread}
    source = (
        f"{len(texts)} {f'captions of {LISTING.name}' if LISTING.is_file() else 'written captions'}"
    )
    notes = [f"{source}; medians over {rounds} rounds in turns after one of warm-up; one core."]
    publish("phrases", shown, notes, out)


def startup(*, rounds: int = 7, out: Path | None = None) -> None:
    """Wall and CPU seconds of --help, of list, and of a command up to its first training step."""

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run(line: str, folder: str | None = None) -> tuple[float, float]:
        before, start = cpu_seconds(), time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "gradeclip_ft", *line.split()]
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        return time.perf_counter() - start, cpu_seconds() - before

    times: dict[str, list[tuple[float, float]]] = {}
    for line in ("--help", "list", "list explainers", "train --help"):
        times[line] = [run(line) for _ in range(rounds)]
    smoke = "train +exp=smoke evaluation.before=false evaluation.after=false trainer.max_steps=1"
    for _ in range(max(rounds // 2, 1)):
        with tempfile.TemporaryDirectory() as folder:  # empty, then beside its data
            for name in ("drawn", "there"):
                key = f"+exp=smoke up to its first step, data {name}"
                line = f"{smoke} optim.schedule.warmup=0 name={name}"
                times.setdefault(key, []).append(run(line, folder))
    rows: Rows = {}
    for name, runs in times.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        rows[name] = {"seconds": wall, "CPU seconds": cpu}
    notes = [
        "Medians of the wall's and of the processes' own CPU seconds, children included; processes "
        "are new, files are in the page cache.",
        "smoke: trainer.max_steps=1 and no evaluation; the model, data workers, one step, its "
        "checkpoint and weights are in it.",
    ]
    publish("startup", rows, notes, out)


ACTIONS = {
    action.__name__: action
    for action in (
        step,
        scaling,
        memory,
        pooling,
        explain,
        evaluate,
        faithfulness,
        segment,
        loader,
        photos,
        phrases,
        startup,
    )
}


def main(arguments: list[str]) -> int:
    """Run one action, or show them all."""
    if arguments and arguments[0] in ACTIONS:
        action = ACTIONS[arguments[0]]
        return perform(lambda: call(action, arguments[1:]), full=wants_traceback())
    print(__doc__)
    for name, action in ACTIONS.items():
        print(f"{name} {usage(action)}\n    {(action.__doc__ or '').splitlines()[0]}")
    return 0 if arguments in ([], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
