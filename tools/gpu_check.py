"""What a GPU does with this package, part by part: `python -m tools.gpu_check [key=value ...]`.

Each part writes its answer into `out`.json as soon as it has one, so that an interrupted check goes
on where it was; `out`.md is the same as tables. On a CPU (`device=cpu`) every part runs at reduced
size, to prove the script and nothing about speed.

    python -m tools.gpu_check                          # all parts, 8 minutes on an H100
    python -m tools.gpu_check parts=compiled,profile   # some of them, made again
    python -m tools.gpu_check device=cpu out=/tmp/check

A machine without a network that has torch, torchvision, lightning and transformers takes the rest,
`tools/gpu_wheels.txt`, from a folder that another machine with the same Python has filled:

    pip wheel --no-deps --wheel-dir whl --requirement tools/gpu_wheels.txt
    pip install --no-index --no-deps --target packages whl/*.whl    # then PYTHONPATH=packages
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.commands.cli import call
from gradeclip_ft.explain.base import heat_from_trace
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.images import read_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from tools.measure import (
    GRAD_ECLIP,
    OPEN_CLIP,
    ORDINARY,
    PHOTOS,
    Pair,
    Steps,
    Turns,
    in_turns,
    make_batch,
    table,
    written,
)

# Dense bf16 peak in FLOP/s, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
CC3M = 2_905_954  # samples of one epoch
WAYS = [OPEN_CLIP, ORDINARY, GRAD_ECLIP]
Row = dict[str, Any]


def gpu_check(
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    parts: tuple[str, ...] = (),
    out: Path = Path("results/gpu"),
) -> int:
    """Run the parts that are missing, or those named."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; device=cpu runs every part in small")
    record = out.with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(record.read_text()) if record.is_file() else {}
    failed = False
    for name in parts or [part for part in PARTS if part not in found]:
        start = time.perf_counter()
        try:
            rows = PARTS[name](device)
        except Exception as error:  # a part that fails must not cost the others their minutes
            rows, failed = [{"failed": f"{type(error).__name__}: {error}"[:600]}], True
        found[name] = {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}
        record.write_text(json.dumps(found, indent=1))
        sections = {
            name: f"\n## {name} ({part['seconds']} s)\n\n{table(part['rows'])}"
            for name, part in found.items()
        }
        out.with_suffix(".md").write_text("".join(sections.values()))
        print(sections[name], flush=True)
    return int(failed)


def environment(device: str) -> list[Row]:
    """Card, driver and versions."""
    card: Row = {"card": platform.processor(), "GiB": ""}
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        card = {"card": torch.cuda.get_device_name(), "GiB": round(memory / 2**30, 1)}
    numbers = {"cuda": torch.version.cuda or "", "torch": torch.__version__}
    numbers |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return [card | numbers | {"cores": os.cpu_count()}]


def exactness(device: str) -> list[Row]:
    """Embedding, dense features, maps, loss and gradient against fp32 on the CPU."""
    rows = []
    for name in ("ViT-B-32", "EVA02-B-16") if device == "cuda" else ("ViT-B-32",):
        loaded = load(name)
        batch = make_batch(loaded, written_pairs(loaded, 8), 3)
        reference = one_step(loaded, batch, "cpu", torch.float32)
        for label, precision in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            measured = one_step(loaded, batch, device, precision)
            errors = {
                key: float((measured[key] - expected).norm() / expected.norm())
                for key, expected in reference.items()
            }
            rows.append({"model": name, "precision": label, **errors})
    return rows


def one_step(
    loaded: LoadedClip, batch: CaptionBatch, device: str, precision: torch.dtype
) -> dict[str, Tensor]:
    """What a step computes, in fp32 on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clip, batch = loaded.clip.to(device), batch.to(device)
    clip.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=precision is torch.bfloat16):
        trace = clip.image.trace(batch.images)
        captions, distinct = clip.encode_texts_of(batch)
        dense = trace.dense()
        heat = heat_from_trace(GradEclip(), trace, distinct[batch.phrase], batch.owner)
        loss = GlobalLocal(GradEclip(create_graph=True))(clip, batch).total
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in clip.parameters() if p.grad is not None])
    found = {"embedding": trace.embedding, "text": captions, "dense": dense, "map": heat}
    found |= {"loss": loss, "gradient": gradient}
    return {key: value.detach().float().cpu() for key, value in found.items()}


def train(folder: str, *words: str) -> tuple[Row, list[Row]]:
    """The command itself: exit code, seconds and last words of a failure; and its metrics."""
    command = [sys.executable, "-m", "gradeclip_ft", "train", f"runs_dir={folder}", "evaluator=[]"]
    start = time.perf_counter()
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    row: Row = {"code": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
    if done.returncode:
        return row | {"said": (done.stdout + done.stderr)[-600:]}, []
    name = next(word.removeprefix("name=") for word in words if word.startswith("name="))
    lines = Path(folder, name, "metrics.jsonl").read_text().splitlines()
    if "optim.compile=inductor" in words:
        row["gave up compiling"] = "recompile_limit" in done.stderr
    return row, [line for line in map(json.loads, lines) if "loss" in line]


def training(device: str) -> list[Row]:
    """The command itself: one process, NCCL (or gloo) with one rank, resume."""
    single = ["trainer=gpu"] if device == "cuda" else ["trainer=cpu"]
    exact = [*single, "trainer.precision=32-true"]
    ranks = ["trainer=ddp", "trainer.devices=1"] if device == "cuda" else ["trainer=ddp_sim"]
    runs = {
        "fp32": [*exact, "name=fp32"],
        "default": [*single, "name=default"],
        "ddp": [*ranks, "name=ddp"],
        "half": [*exact, "name=half", "trainer.stop_at=2"],
        "resumed": [*exact, "name=half", "resume=auto"],
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in runs.items():
            row, lines = train(folder, "+exp=smoke", *words)
            rows.append({"run": name, **row, "losses": [line["loss"] for line in lines]})
    rows[-1]["equals fp32 run"] = rows[-1]["losses"] == rows[0]["losses"]
    return rows


def synchronisation(device: str) -> list[Row]:
    """Places in a Grad-ECLIP step where the host waits for the GPU, by CUDA's warning mode."""
    if device != "cuda":
        return [{"skipped": "needs CUDA"}]
    loaded = load("ViT-B-32")
    run = Steps(loaded, device).variants(written_pairs(loaded, 32), 3)[GRAD_ECLIP]
    run()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught})
    return [{"waits": len(caught), "where": ", ".join(places)}]


def step(device: str) -> list[Row]:
    """Images/s, memory and utilisation of a bf16 step, and its time over open_clip's."""
    cuda = device == "cuda"
    rows = []
    for name in ("ViT-B-16", "EVA02-B-16") if cuda else ("ViT-B-32",):
        for size in (64, 256, 512) if cuda else (2,):
            try:
                rows += step_rows(name, size, device)
            except torch.cuda.OutOfMemoryError:
                rows.append({"model": name, "batch": size, "way": "out of memory"})
                torch.cuda.empty_cache()
    return rows


def step_rows(name: str, size: int, device: str, **options: bool) -> list[Row]:
    """One model and batch, with the options of `variants`."""
    loaded = load(name)
    if options.get("grad_checkpointing"):
        loaded.require_clip("trained").set_grad_checkpointing()
    steps = Steps(loaded, device, fused=options.get("fused", False))
    every = steps.variants(written_pairs(loaded, size), 3)
    names = [OPEN_CLIP, GRAD_ECLIP] if options else WAYS
    return timed({way: every[way] for way in names}, name, size, device, None, **options)


def timed(
    ways: dict[str, Callable[[], None]],
    name: str,
    size: int,
    device: str,
    operations: Mapping[str, float] | None = None,
    **options: bool,
) -> list[Row]:
    """Rows of steps in turns; operations are counted if they are not given.

    Counting comes last: after it, compiled blocks run plainly for the rest of the process.
    """
    turns = in_device_turns(ways, device, 8)
    rows: list[Row] = []
    for way, run in ways.items():
        seconds = turns.median(way)
        row: Row = {"model": name, "batch": size, "way": way, **options}
        row |= {"images/s": round(size / seconds), "of open_clip": turns.against(way, OPEN_CLIP)[0]}
        row["hours for CC3M"] = CC3M * seconds / size / 3600
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            row["launching"] = (time.perf_counter() - start) / seconds
            row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        rows.append(row)
    operations = operations or {way: counted(run) for way, run in ways.items()}
    for row, way in zip(rows, ways, strict=True):
        rate = operations[way] / turns.median(way)
        card = torch.cuda.get_device_name() if device == "cuda" else ""
        peak = next((value for part, value in PEAKS.items() if part in card), math.nan)
        row |= {"TFLOP/s": round(rate / 1e12), "utilisation": rate / peak}
    return rows


def counted(run: Callable[[], None]) -> int:
    """Operations of a step's matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def variants(device: str) -> list[Row]:
    """The same step with a fused optimiser, and with recomputed activations."""
    name, size = ("EVA02-B-16", 256) if device == "cuda" else ("ViT-B-32", 2)
    rows = step_rows(name, size, device, fused=True)
    return rows + step_rows(name, size, device, grad_checkpointing=True)


@cache
def both_steps(
    name: str, size: int, device: str
) -> tuple[list[Row], dict[str, Callable[[], None]], list[Row]]:
    """Rows of eager steps, compiled steps that have run, and their rows."""
    loaded = load(name)
    steps = Steps(loaded, device, fused=True)
    every = steps.variants(written_pairs(loaded, size), 3)
    ways = {way: every[way] for way in WAYS}
    operations = {way: counted(run) for way, run in ways.items()}
    eager = timed(ways, name, size, device, operations, compiled=False)
    steps.clip.compile_blocks("inductor" if device == "cuda" else "aot_eager")
    graphs: Any = torch._dynamo.utils.counters
    graphs.clear()
    start = time.perf_counter()
    for run in ways.values():
        run()
    seconds, count = time.perf_counter() - start, graphs["stats"]["unique_graphs"]
    rows = timed(ways, name, size, device, operations, compiled=True)
    for row, before in zip(rows, eager, strict=True):
        row |= {"of eager": before["images/s"] / row["images/s"]}
    rows[0] |= {"seconds of compiling": round(seconds), "graphs": count}
    rows[0]["later graphs"] = graphs["stats"]["unique_graphs"] - count
    rows[0]["breaks"] = sum(graphs["graph_break"].values())
    return eager, ways, rows


def compiled(device: str) -> list[Row]:
    """Steps with fused AdamW, plain and with compiled blocks, against open_clip's of each kind."""
    rows = []
    for name in ("ViT-B-16", "EVA02-B-16") if device == "cuda" else ("ViT-B-32",):
        eager, _, after = both_steps(name, 256 if device == "cuda" else 2, device)
        rows += [*eager, *after]
    return rows


def profile(device: str) -> list[Row]:
    """Where a compiled step's time on the device goes: shares by kind, and its top 15 kernels."""
    name, size = ("ViT-B-16", 256) if device == "cuda" else ("ViT-B-32", 2)
    _, ways, _ = both_steps(name, size, device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    rows: list[Row] = []
    for way in (OPEN_CLIP, GRAD_ECLIP):
        with torch.profiler.profile(activities=kinds) as profiler:
            start = time.perf_counter()
            ways[way]()
            if device == "cuda":
                torch.cuda.synchronize()
            wall = 1000 * (time.perf_counter() - start)
        found = {}
        for event in profiler.key_averages():
            on_device = event.device_type.name == "CUDA"
            used = event.self_device_time_total if on_device else event.self_cpu_time_total
            if on_device == (device == "cuda") and used:
                found[event.key] = (used / 1000, event.count)
        total = sum(each for each, _ in found.values())
        shares: dict[str, float] = {}
        for key, (each, _) in found.items():
            shares[kernel_kind(key)] = shares.get(kernel_kind(key), 0) + each
        row: Row = {"model": name, "way": way}
        rows.append(row | {"what": "wall, with the profiler", "ms": wall})
        rows.append(row | {"what": "kernels", "ms": total, "share": 1.0})
        ranked = sorted(shares.items(), key=lambda pair: -pair[1])
        rows += [row | {"what": what, "ms": ms, "share": ms / total} for what, ms in ranked]
        for key, (ms, calls) in sorted(found.items(), key=lambda pair: -pair[1][0])[:15]:
            known = {"what": f"`{key[:90]}`".replace("|", "/"), "calls": calls}
            rows.append(row | known | {"ms": ms, "share": ms / total})
    return rows


KINDS = {  # by what is in the name of a kernel of cuBLAS, cuDNN, FlashAttention, Inductor or ATen
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm", "::bmm", "cublas"),
    "convolution": ("conv", "wgrad", "dgrad", "im2col"),
    "optimiser": ("multi_tensor", "adam", "foreach"),
    "copies": ("memcpy", "memset"),
    "sorting and indexing": ("sort", "index", "scatter", "gather", "embedding"),
}


def kernel_kind(name: str) -> str:
    """What a kernel does; all that is left works element by element or sums."""
    lower = name.lower()
    if lower.startswith("triton_"):  # Inductor names what it fused, products among it
        return "compiled elementwise"
    fitting = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
    return next(fitting, "other elementwise")


def throughput(device: str) -> list[Row]:
    """Images per second of encoding, dense features and maps in fp32 and bf16."""
    loaded = load("ViT-B-16" if device == "cuda" else "ViT-B-32")
    size = 64 if device == "cuda" else 2
    images = torch.randn(size, 3, *loaded.image_size, device=device)
    tower = loaded.clip.to(device).eval().image
    with torch.no_grad():
        width = tower.encode(images[:1]).shape[1]
    targets = nn.functional.normalize(torch.randn(10 * size, width, device=device), dim=-1)
    owner = torch.arange(size, device=device).repeat_interleave(10)
    ways: dict[str, Callable[[], Any]] = {
        "encode": torch.no_grad()(lambda: tower.encode(images)),
        "dense": torch.no_grad()(lambda: tower.trace(images).dense()),
        "10 maps each": lambda: heat_from_trace(GradEclip(), tower.trace(images), targets, owner),
    }
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            turns = in_device_turns(ways, device, 5)
        for way in ways:
            rate = round(size / turns.median(way))
            rows.append({"precision": str(precision), "what": way, "images/s": rate})
    return rows


def loop(device: str) -> list[Row]:
    """The command on real shards: images/s with loader, varying texts and everything around."""
    if not shards().is_dir():
        return [{"skipped": f"no shards in {shards()}"}]
    cuda = device == "cuda"
    steps, workers = (80, max((os.cpu_count() or 2) - 2, 1)) if cuda else (4, 1)
    words = ["+exp=cc3m_vitb16"] if cuda else ["model=open_clip", "model.name=ViT-B-32"]
    words += ["model.weights=random", "data=cc3m", f"data.shards={shards()}", "name=loop"]
    words += ["data.samples_per_epoch=100000", f"data.workers={workers}", "++data.tagger=textblob"]
    words += ["trainer=gpu" if cuda else "trainer=cpu", f"trainer.max_steps={steps}"]
    words += ["trainer.log_every=1", "++data.shuffle=100", "optim.schedule.warmup=1"]
    rows = []
    for size, compiled in ((64, False), (64, True)) if cuda else ((2, False),):
        more = [f"data.batch_size={size}", *(["optim.compile=inductor"] if compiled else [])]
        with tempfile.TemporaryDirectory() as folder:
            row, lines = train(folder, *words, *more)
        rows.append({"batch": size, "compiled": compiled, **row})
        if lines:
            late = lines[len(lines) // 2 :]  # the first half compiles, and fills the buffers
            rate = statistics.median(line["samples_per_second"] for line in late)
            rows[-1] |= {"images/s": round(rate), "hours for CC3M": CC3M / rate / 3600}
    return rows


def loading(device: str) -> list[Row]:
    """Images per second and core: decode a 512-pixel JPEG, then the training transform.

    COCO photos beside the checkout, else one blurred picture; `difference` is the mean over the
    pixels that the model sees, in steps of 8 bits.
    """
    transform = replace(load("ViT-B-32").transform(train=True), normalised=False)
    centre = replace(transform, train=False)
    coarse = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(coarse, (512, 683), mode="bicubic").clamp(0, 1) * 255
    pictures = [Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy())]
    if photos := sorted((PHOTOS / "images").glob("*.jpg"))[:40]:
        pictures = [read_image(photo) for photo in photos]
    files = []
    for picture in pictures:
        ratio = 512 / min(picture.size)
        size = (round(ratio * picture.width), round(ratio * picture.height))
        file = BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for draft in (None, 448, 224):
        rates = []
        for _ in range(5 if device == "cuda" else 3):
            start = time.process_time()
            for content in files:
                transform(read_image(content, draft=draft))
            rates.append(len(files) / (time.process_time() - start))
        moved = [
            centre(read_image(content, draft=draft)).float() - centre(read_image(content)).float()
            for content in files
        ]
        row: Row = {"draft": draft or "", "images/s per core": round(statistics.median(rates))}
        row["difference"] = float(torch.stack(moved).abs().mean())
        rows.append(row | {"pictures": len(files), "cores": os.cpu_count()})
    torch.set_num_threads(threads)
    return rows


def shards() -> Path:
    """Captioned photos beside the checkout, or those in $GPU_CHECK_SHARDS."""
    return Path(os.environ.get("GPU_CHECK_SHARDS", "../shared/data/flickr_photos"))


def load(name: str) -> LoadedClip:
    """With random weights."""
    torch.manual_seed(0)
    return load_clip(name, "random")


def written_pairs(loaded: LoadedClip, size: int) -> list[Pair]:
    """Random pixels, written captions; phrases repeat between images as they do in the world."""
    return [written(number, loaded.image_size) for number in range(size)]


def in_device_turns(ways: dict[str, Callable[[], Any]], device: str, rounds: int) -> Turns:
    """Wall seconds, when the device has finished; after three rounds that are not counted."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    cuda = device == "cuda"
    return in_turns(ways, rounds if cuda else 1, now, warm_up=3 if cuda else 0)


PARTS: dict[str, Callable[[str], list[Row]]] = {
    part.__name__: part
    for part in (
        *(environment, exactness, training, synchronisation, step),
        *(variants, compiled, profile, throughput, loading, loop),
    )
}

if __name__ == "__main__":
    sys.exit(call(gpu_check, sys.argv[1:]))
