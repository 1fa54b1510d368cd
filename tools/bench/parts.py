"""What explanations, evaluations, loading, phrases and starting cost, beside other programs."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import nltk
import torch
import webdataset
from open_clip.transform import image_transform
from torch import Tensor

from gradeclip_ft.data.captions import CaptionTrainData, caption_phrases, phrase_entry
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.data.make_shards import add_phrases, write_shard
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.data.shards import Skips, read_shard
from gradeclip_ft.evaluators.base import evaluating
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import class_embeddings
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger

from .inputs import LISTING, PHOTOS, PROMPT, read_pairs, tagger_name
from .measure import Rows, in_turns, publish
from .step import published_heat

FEW, MANY, IMAGES = 10, 64, 8
PAIRS, PHRASES = "loop over 8 x 10 pairs", "loop over 10 phrases, for 8 images"
EXPLAINED = (
    ("map, 1 image, 10 embeddings", "encode_image, 1 image"),
    ("maps, 1 image, 10 phrases", "encoders, 1 image, 10 phrases"),
    ("maps, 1 image, 64 phrases", "encoders, 1 image, 64 phrases"),
    (PAIRS, "maps, 8 images x 10 phrases"),
    (PHRASES, "maps, 8 images x 10 phrases"),
)
SHARDS = PHOTOS.parent / "flickr_photos"
GRAMMAR = nltk.RegexpParser("NP: {<JJ.*>*<NN.*>+}")
PROGRAM = (sys.executable, "-m", "gradeclip_ft")
SMOKE = ("train", "+exp=smoke", "evaluation.before=false", "evaluation.after=false")


def explain(
    *, model: str = "ViT-B-16", rounds: int = 7, threads: int = 1, out: Path | None = None
) -> None:
    """Grad-ECLIP on one image and on eight, beside encode_image, encode_text and a pair loop."""
    torch.set_num_threads(threads)
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

    def loop(ids: Tensor) -> None:
        """The authors' way: native text, image up to the last block, then block and gradients."""
        with torch.no_grad():
            target = library.encode_text(ids)
            opened = native.image.open(pixels[:1])
            tokens = opened.run(opened.tokens, 0, len(opened.layers) - 1)
        published_heat(opened, tokens, target, torch.zeros(len(ids), dtype=torch.long))

    def pairwise() -> None:
        for row in ids:
            loop(row.unsqueeze(0))

    ids = loaded.tokenizer(texts[:FEW])
    variants: dict[str, Callable[[], object]] = {
        "encode_image, 1 image": partial(encode, 0),
        "encoders, 1 image, 10 phrases": partial(encode, FEW),
        "map, 1 image, 10 embeddings": partial(maps, 1, FEW, given=True),
        "maps, 1 image, 10 phrases": partial(maps, 1, FEW),
        "encoders, 1 image, 64 phrases": partial(encode, MANY),
        "maps, 1 image, 64 phrases": partial(maps, 1, MANY),
        "maps, 8 images x 10 phrases": partial(maps, IMAGES, FEW),
        PAIRS: pairwise,
        PHRASES: partial(loop, ids),
    }
    turns = in_turns(variants, rounds)
    for name in (PAIRS, PHRASES):
        turns.seconds[name][:] = [IMAGES * seconds for seconds in turns.seconds[name]]
    notes = [
        f"{source}; medians over {rounds} rounds in turns after one of warm-up.",
        "encoders: open_clip's encode_image and encode_text, texts of 77 tokens, without a graph. "
        "maps: phrases of their own length are encoded, too.",
        "loop over pairs: both encoders, a full last block and a backward pass for every pair; "
        "loop over phrases: encoders once, a backward pass for every phrase. Both are timed on one "
        f"image and counted {IMAGES} times: every image costs the same.",
    ]
    publish(f"explain, {model}, cpu", turns.rows(EXPLAINED), notes, out, threads)


def evaluate(
    *,
    annotations: Path = PHOTOS / "annotations" / "instances_val2017.json",
    images: Path = PHOTOS / "images",
    model: str = "ViT-B-16",
    image_size: int = 224,
    photos: int = 100,
    batch_size: int = 16,
    workers: int = 0,
    rounds: int = 7,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """A region evaluation, photos loaded and decoded, beside the forward pass alone.

    The forward reads pixels from memory; the evaluation loads photos and masks, traces, pools and
    classifies. Class texts are encoded once per model, whatever the number of photos.
    """
    torch.set_num_threads(threads)
    loaded = load_clip(model, "random")
    data, sentence = (
        CocoRegions(str(annotations), str(images), limit=photos),
        ["a photo of the {}."],
    )
    regions = RegionEvaluator(
        "bench", data, image_size, sentence, batch_size=batch_size, workers=workers
    )
    opened = data(image_size=image_size, patch=loaded.patch, mean=loaded.mean, std=loaded.std)
    pixels = [batch.images for batch in opened.batches(batch_size, 0)]

    def forward() -> None:
        with evaluating(loaded.clip):
            for batch in pixels:
                loaded.clip.image.encode(batch)

    def texts() -> None:
        with evaluating(loaded.clip):
            class_embeddings(loaded.clip, loaded.tokenizer, opened.classes, sentence)

    names = ("encoder forward, pixels in memory", "evaluation", "class texts")
    calls: tuple[Callable[[], object], ...] = (forward, partial(regions, loaded), texts)
    clock = time.perf_counter if workers else None  # workers have clocks of their own
    turns = in_turns(dict(zip(names, calls, strict=True)), rounds, clock)
    share = turns.ratio(names[1], names[0]) - turns.ratio(names[2], names[0])
    rows = turns.rows() | {"evaluation without class texts / forward": {"ratio": share}}
    notes = [
        f"{len(opened)} photos at {image_size} px, {opened.counts['things']} regions; medians over "
        f"{rounds} rounds in turns after one of warm-up."
    ]
    publish(f"evaluate, {model}, cpu", rows, notes, out, threads)


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

    def theirs(shard: Path, train: bool) -> int:
        transform = image_transform(loaded.image_size[0], is_train=train)
        data = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        pairs = data.decode("pilrgb").rename(image="jpg;jpeg;png").map_dict(image=transform)
        return sum(1 for _ in pairs)

    def ours(shard: Path, phrases: int) -> int:
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

    with tempfile.TemporaryDirectory() as folder:
        plain, ahead, source = two_shards(shards, limit, Path(folder))
        bare = "webdataset decode, open_clip transform"
        variants: dict[str, Callable[[], object]] = {
            bare: partial(theirs, plain, True),
            "the same, resize and crop in the centre": partial(theirs, plain, False),
            "ours, no phrases": partial(ours, plain, 0),
            "ours, phrases found by the worker": partial(ours, plain, 5),
            "ours, phrases computed ahead": partial(ours, ahead, 5),
        }
        turns = in_turns(variants, rounds)
    whole = limit // batch_size * batch_size
    read = {name: whole if name.startswith("ours") else limit for name in variants}
    rows: Rows = {
        name: {
            "images/s": count / turns.median(name),
            "throughput / bare": count / limit / turns.ratio(name, bare),
        }
        for name, count in read.items()
    }
    notes = [
        f"{source}, batches of {batch_size}; tagger {tagger_name()}; CPU seconds of one process; "
        f"medians over {rounds} rounds in turns after one of warm-up.",
        "open_clip's transform for training is RandomResizedCrop; ours resizes the shortest side "
        "and crops at random.",
    ]
    publish(f"loader, {model}", rows, notes, out)


def two_shards(given: str | None, limit: int, folder: Path) -> tuple[Path, Path, str]:
    """One shard of `limit` samples, and the same with phrases computed ahead."""
    plain, ahead = folder / "plain.tar", folder / "ahead" / "plain.tar"
    ahead.parent.mkdir()
    urls = [given] if given else sorted(map(str, SHARDS.glob("*.tar")))
    samples: list[dict[str, Any]] = []
    for sample in (sample for url in urls for sample in read_shard(url, Skips())):
        suffix = next(key for key in ("jpg", "jpeg", "png") if key in sample)
        samples.append({suffix: sample[suffix], "txt": sample["txt"]})
    source = f"{limit} photos of {Path(urls[0]).parent.name}" if urls else "written samples"
    if not samples:
        for pair in read_pairs(0)[0]:
            content = BytesIO()
            pair.image.save(content, "JPEG", quality=90)
            samples.append({"jpg": content.getvalue(), "txt": pair.captions[0].encode()})
    rows = [{**samples[n % len(samples)], "__key__": f"{n:06d}"} for n in range(limit)]
    write_shard(plain, rows)
    add_phrases(str(plain), ahead.parent, tagger=tagger_name(), max_phrases=20)
    return plain, ahead, source


def phrases(*, count: int = 2000, rounds: int = 7, out: Path | None = None) -> None:
    """Phrases by each tagger, by lookup, and by NLTK's own functions one after the other."""
    source = f"{count} captions of {LISTING.name}" if LISTING.is_file() else "written captions"
    rows = read_captions(LISTING) if LISTING.is_file() else read_pairs(0)[0]
    texts = [caption for entry in rows for caption in entry.captions][:count]

    def tags(text: str) -> Any:
        return nltk.pos_tag(nltk.NLTKWordTokenizer().tokenize(text.lower()))

    def plain(text: str) -> list[str]:
        """What NLTK's documentation shows."""
        parts = GRAMMAR.parse(tags(text)).subtrees()
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

    variants = {name: partial(each, find) for name, find in functions.items()}
    turns, base = in_turns(variants, rounds), next(iter(variants))
    table: Rows = {
        name: {
            "captions/s": len(texts) / turns.median(name),
            "faster than the first row": turns.ratio(base, name),
            "rounds": turns.spread(base, name),
        }
        for name in variants
    }
    notes = [f"{source}; medians over {rounds} rounds in turns after one of warm-up; one core."]
    publish("phrases", table, notes, out, None)


def startup(*, rounds: int = 7, out: Path | None = None) -> None:
    """Wall and CPU seconds of --help, of list, and of a command up to its first training step."""

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run(words: Sequence[str], folder: str | None = None) -> tuple[float, float]:
        before, start = children(), time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [*PROGRAM, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-500:]}")
        return time.perf_counter() - start, children() - before

    times: dict[str, list[tuple[float, float]]] = {}
    for words in ("--help", "list", "list explainers", "train --help"):
        times[words] = [run(words.split()) for _ in range(rounds)]
    for _ in range(max(rounds // 2, 1)):
        with tempfile.TemporaryDirectory() as folder:  # empty, then beside its data
            for name in ("drawn", "there"):
                line = (*SMOKE, f"name={name}", "trainer.max_steps=1", "optim.schedule.warmup=0")
                key = f"+exp=smoke up to its first step, data {name}"
                times.setdefault(key, []).append(run(line, folder))
            lines = (Path(folder) / "runs/there/metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[0])["step"] == 1
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
    publish("startup", rows, notes, out, None)
