"""What a GPU does with this package, part by part: `python -m tools.gpu_check [key=value ...]`.

Each part writes its answer into `out`.json as soon as it has one, so that an interrupted check goes
on where it was; `out`.md is the same as tables. On a CPU (`device=cpu`) every part runs at reduced
size, to prove the script and nothing about speed.

    python -m tools.gpu_check                        # all parts, 5 minutes on an H100
    python -m tools.gpu_check parts=exactness,step   # some of them, made again
    python -m tools.gpu_check device=cpu out=/tmp/check

A machine without a network needs these wheels beside torch, torchvision and lightning:
open_clip_torch, timm, ftfy, wcwidth, hydra-core, omegaconf, antlr4-python3-runtime, webdataset,
braceexpand, nltk, textblob, pycocotools, jaxtyping, wadler_lindig, rich, safetensors.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.captions import Sample, collate
from gradeclip_ft.explain.base import heat_from_trace
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.base import Objective
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly

# Dense bf16 peak in FLOP/s, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
CC3M = 2_905_954  # samples of one epoch
COLOURS = ("red", "blue", "white", "old", "small", "wooden", "striped", "tall", "wet", "bright")
THINGS = ("dog", "car", "table", "boat", "umbrella", "clock", "horse", "kite", "street", "cup")
PROMPT = "This is a photo of the {}"
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Run the parts that are missing, or those named."""
    options = {"device": "cuda", "out": "results/gpu", "parts": ""}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in options:
            print(f"error: {key}= is not an option; expected {', '.join(options)}", file=sys.stderr)
            return 2
        options[key] = value
    if options["device"] == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; device=cpu runs every part in small", file=sys.stderr)
        return 2
    out, device = Path(options["out"]), options["device"]
    record = out.with_suffix(".json")
    found = json.loads(record.read_text()) if record.is_file() else {}
    names = (
        options["parts"].split(",") if options["parts"] else [p for p in PARTS if p not in found]
    )
    failed = False
    for name in names:
        start = time.perf_counter()
        try:
            rows = PARTS[name](device)
        except Exception as error:  # a part that fails must not cost the others their minutes
            rows, failed = [{"failed": f"{type(error).__name__}: {error}"[:600]}], True
        found[name] = {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}
        out.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found, indent=1))
        out.with_suffix(".md").write_text(_markdown(found))
        print(_markdown({name: found[name]}), flush=True)
    return int(failed)


def environment(device: str) -> list[Row]:
    """Card, driver and versions."""
    cuda = device == "cuda"
    return [
        {
            "card": torch.cuda.get_device_name() if cuda else platform.processor(),
            "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
            if cuda
            else "",
            "cuda": torch.version.cuda or "",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"),
        }
    ]


def exactness(device: str) -> list[Row]:
    """Embedding, dense features, maps, loss and gradient against fp32 on the CPU."""
    rows = []
    for name in ("ViT-B-32", "EVA02-B-16") if device == "cuda" else ("ViT-B-32",):
        loaded = _load(name)
        batch = _batch(loaded, 8, 3)
        reference = _one_step(loaded, batch, "cpu", None)
        cases: list[tuple[str, torch.dtype | None]] = [("fp32", None), ("bf16", torch.bfloat16)]
        for label, precision in cases:
            measured = _one_step(loaded, batch, device, precision)
            errors = {k: _relative(measured[k], reference[k]) for k in reference}
            rows.append({"model": name, "precision": label, **errors})
    return rows


def _one_step(
    loaded: LoadedClip, batch: CaptionBatch, device: str, precision: torch.dtype | None
) -> dict[str, Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clip, batch = loaded.clip.to(device), batch.to(device)
    clip.zero_grad()
    with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
        trace = clip.image.trace(batch.images)
        captions, distinct = clip.encode_texts_of(batch)
        dense = trace.dense()
        heat = heat_from_trace(GradEclip(), trace, distinct[batch.phrase], batch.owner)
        loss = GlobalLocal(GradEclip(create_graph=True))(clip, batch).total
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in clip.parameters() if p.grad is not None])
    found = {
        "embedding": trace.embedding,
        "text": captions,
        "dense": dense,
        "map": heat,
        "loss": loss,
        "gradient": gradient,
    }
    return {key: value.detach().float().cpu() for key, value in found.items()}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def training(device: str) -> list[Row]:
    """The command itself: one process, NCCL (or gloo) with one rank, resume."""
    folder = Path(tempfile.mkdtemp())
    single = ["trainer=gpu"] if device == "cuda" else ["trainer=cpu"]
    exact = [*single, "trainer.precision=32-true"]
    ranks = ["trainer=ddp", "trainer.devices=1"] if device == "cuda" else ["trainer=ddp_sim"]
    runs = {
        "fp32": exact,
        "default": single,
        "ddp": ranks,
        "half": [*exact, "trainer.stop_at=2"],
        "resumed": [*exact, "resume=auto"],
    }
    rows = []
    for name, extra in runs.items():
        run = "half" if name == "resumed" else name
        command = [sys.executable, "-m", "gradeclip_ft", "train", "+exp=smoke", f"name={run}"]
        command += [f"runs_dir={folder}", "evaluator=[]", *extra]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (
            (folder / run / "metrics.jsonl").read_text().splitlines() if not done.returncode else []
        )
        losses = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]
        row: Row = {"run": name, "code": done.returncode, "losses": losses}
        row["seconds"] = round(time.perf_counter() - start, 1)
        if done.returncode:
            row["said"] = (done.stdout + done.stderr)[-600:]
        rows.append(row)
    rows[-1]["equals fp32 run"] = rows[-1]["losses"] == rows[0]["losses"]
    shutil.rmtree(folder)
    return rows


def synchronisation(device: str) -> list[Row]:
    """Places in a Grad-ECLIP step where the host waits for the GPU, by CUDA's warning mode."""
    if device != "cuda":
        return [{"skipped": "needs CUDA"}]
    loaded = _load("ViT-B-32")
    step = _Step(loaded, _batch(loaded, 32, 3).to(device), device)
    step.ours(GlobalLocal(GradEclip(create_graph=True)))
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.ours(GlobalLocal(GradEclip(create_graph=True)))
    torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught})
    return [{"waits": len(caught), "where": ", ".join(places)}]


class _Step:
    """One training step in bf16, ours or open_clip's, on one model and one batch."""

    def __init__(self, loaded: LoadedClip, batch: CaptionBatch, device: str, fused: bool = False):
        self.clip, self.batch, self.device = loaded.clip.to(device).train(), batch, device
        words = [f"a photo number {n} of many things in a street" for n in range(len(batch.images))]
        self.full = loaded.tokenizer(words).to(device)
        self.optimizer = AdamW(self.clip.parameters(), lr=1e-5, weight_decay=0.1, fused=fused)

    def ours(self, objective: Objective) -> None:
        self._update(lambda: objective(self.clip, self.batch).total)

    def open_clip(self) -> None:
        """As open_clip's own training does: the model on full contexts, and ClipLoss."""
        model: Any = self.clip.model
        self._update(lambda: ClipLoss()(*model(self.batch.images, self.full)[:3]))

    def _update(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def step(device: str) -> list[Row]:
    """Images/s, memory and utilisation of a bf16 step, and its time over open_clip's."""
    cuda = device == "cuda"
    rows = []
    for name in ("ViT-B-16", "EVA02-B-16") if cuda else ("ViT-B-32",):
        for size in (64, 256, 512) if cuda else (2,):
            try:
                rows += _step_rows(name, size, device)
            except torch.cuda.OutOfMemoryError:
                rows.append({"model": name, "batch": size, "way": "out of memory"})
                torch.cuda.empty_cache()
    return rows


def _step_rows(name: str, size: int, device: str, **options: Any) -> list[Row]:
    loaded = _load(name)
    if options.get("grad_checkpointing"):
        loaded.require_clip("trained").set_grad_checkpointing()
    if options.get("compile"):
        loaded.require_clip("trained").compile_blocks("inductor")
    batch = _batch(loaded, size, 3).to(device)
    taken = _Step(loaded, batch, device, fused=bool(options.get("fused")))
    local = GlobalLocal(GradEclip(create_graph=True))
    ways: dict[str, Callable[[], None]] = {
        "open_clip": taken.open_clip,
        "ordinary": lambda: taken.ours(GlobalOnly()),
        "Grad-ECLIP": lambda: taken.ours(local),
    }
    if options:
        del ways["ordinary"]
    times = _in_turns(ways, device, rounds=8 if device == "cuda" else 1)
    rows = []
    for way, run in ways.items():
        seconds = statistics.median(times[way])
        ratios = [a / b for a, b in zip(times[way], times["open_clip"], strict=True)]
        row: Row = {"model": name, "batch": size, "way": way, **options}
        row |= {"images/s": round(size / seconds), "of open_clip": statistics.median(ratios)}
        row["hours for CC3M"] = CC3M * seconds / size / 3600
        rows.append(row | _gpu_columns(run, seconds) if device == "cuda" else row)
    return rows


def _gpu_columns(run: Callable[[], None], seconds: float) -> Row:
    torch.cuda.reset_peak_memory_stats()
    run()
    memory = torch.cuda.max_memory_allocated() / 2**30
    with FlopCounterMode(display=False) as counter:
        run()
    rate = counter.get_total_flops() / seconds
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), math.nan)
    return {"peak GiB": round(memory, 2), "TFLOP/s": round(rate / 1e12), "utilisation": rate / peak}


def variants(device: str) -> list[Row]:
    """The same step with a fused optimiser, recomputed activations, and compiled blocks."""
    name, size = ("EVA02-B-16", 256) if device == "cuda" else ("ViT-B-32", 2)
    rows = _step_rows(name, size, device, fused=True)
    rows += _step_rows(name, size, device, grad_checkpointing=True)
    if device == "cuda":  # about half a minute of compilation
        rows += _step_rows(name, size, device, compile=True, fused=True)
    return rows


def throughput(device: str) -> list[Row]:
    """Images per second of encoding, dense features and maps in fp32 and bf16."""
    loaded = _load("ViT-B-16" if device == "cuda" else "ViT-B-32")
    size = 64 if device == "cuda" else 2
    batch = _batch(loaded, size, 3).to(device)
    clip = loaded.clip.to(device).eval()
    with torch.no_grad():
        width = clip.image.encode(batch.images[:1]).shape[1]
    targets = nn.functional.normalize(torch.randn(10 * size, width, device=device), dim=-1)
    owner = torch.arange(size, device=device).repeat_interleave(10)
    ways: dict[str, Callable[[], Any]] = {
        "encode": lambda: clip.image.encode(batch.images),
        "dense": lambda: clip.image.trace(batch.images).dense(),
        "10 maps each": lambda: heat_from_trace(
            GradEclip(), clip.image.trace(batch.images), targets, owner
        ),
    }
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            with torch.no_grad():
                plain = _in_turns({k: ways[k] for k in ("encode", "dense")}, device, rounds=5)
            maps = _in_turns({"10 maps each": ways["10 maps each"]}, device, rounds=5)
        for way, seconds in {**plain, **maps}.items():
            rate = round(size / statistics.median(seconds))
            rows.append({"precision": str(precision), "what": way, "images/s": rate})
    return rows


def loop(device: str) -> list[Row]:
    """The command on real shards: images/s with loader, varying texts and everything around.

    Reads the shards of captioned photos beside the checkout, or those in $GPU_CHECK_SHARDS.
    """
    shards = os.environ.get("GPU_CHECK_SHARDS", "../shared/data/flickr_photos")
    if not Path(shards).is_dir():
        return [{"skipped": f"no shards in {shards}"}]
    cuda = device == "cuda"
    steps, workers = (80, max((os.cpu_count() or 2) - 2, 1)) if cuda else (4, 1)
    model = ["+exp=cc3m_vitb16"] if cuda else ["model=open_clip", "model.name=ViT-B-32"]
    base = [*model, "model.weights=random", "data=cc3m", f"data.shards={shards}", "evaluator=[]"]
    base += ["data.samples_per_epoch=100000", f"data.workers={workers}", "++data.tagger=textblob"]
    base += ["trainer=gpu" if cuda else "trainer=cpu", f"trainer.max_steps={steps}"]
    base += ["trainer.log_every=1", "++data.shuffle=100", "optim.schedule.warmup=1"]
    rows = []
    for size, compiled in ((64, False), (64, True)) if cuda else ((2, False),):
        folder = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "gradeclip_ft", "train", *base, f"data.batch_size={size}"]
        command += ["name=loop", f"runs_dir={folder}", "optim.compile=inductor"][
            : 3 if compiled else 2
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        row: Row = {"batch": size, "compiled": compiled, "code": done.returncode}
        if done.returncode:
            row["said"] = (done.stdout + done.stderr)[-600:]
        else:
            lines = map(json.loads, (folder / "loop/metrics.jsonl").read_text().splitlines())
            rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
            late = rates[len(rates) // 2 :]  # the first half compiles, and fills the buffers
            row["images/s"] = round(statistics.median(late))
            row["hours for CC3M"] = CC3M / statistics.median(late) / 3600
            row["gave up compiling"] = "recompile_limit" in done.stderr
        rows.append(row)
        shutil.rmtree(folder)
    return rows


def loading(device: str) -> list[Row]:
    """Images per second and core: decode a 640 x 480 JPEG, then the training transform."""
    loaded = _load("ViT-B-32")
    transform = loaded.transform(train=True)
    path = Path(tempfile.mkdtemp()) / "photo.jpg"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 30, 40, generator=generator)
    pixels = nn.functional.interpolate(coarse, (480, 640), mode="bicubic").clamp(0, 1) * 255
    Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).save(path, quality=90)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = 100 if device == "cuda" else 10
    start = time.perf_counter()
    for _ in range(count):
        with Image.open(path) as image:
            transform(image.convert("RGB"))
    rate = count / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    shutil.rmtree(path.parent)
    return [{"images/s per core": round(rate), "cores": os.cpu_count()}]


def _load(name: str) -> LoadedClip:
    torch.manual_seed(0)
    return load_clip(name, "random")


def _batch(loaded: LoadedClip, size: int, phrases: int) -> CaptionBatch:
    """Random pixels, written captions; phrases repeat between images as they do in the world."""
    generator = torch.Generator().manual_seed(0)
    height, width = loaded.image_size
    samples = []
    for number in range(size):
        colours = torch.randperm(10, generator=generator)[:phrases].tolist()
        things = torch.randperm(10, generator=generator)[:phrases].tolist()
        found = [f"{COLOURS[c]} {THINGS[t]}" for c, t in zip(colours, things, strict=True)]
        image = torch.randn(3, height, width, generator=generator)
        caption = f"a {found[0]} in front of a {found[-1]} on a sunny day number {number}"
        samples.append(Sample(str(number), image, caption, found))
    return collate(samples, loaded.tokenizer, PROMPT, {})


def _in_turns(
    ways: dict[str, Callable[[], Any]], device: str, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after three rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-3 if device == "cuda" else 0, rounds):
        for name, run in ways.items():
            start = _now(device)
            run()
            if number >= 0:
                seconds[name].append(_now(device) - start)
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _markdown(found: dict[str, Any]) -> str:
    text = ""
    for name, part in found.items():
        rows = part["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text += f"\n## {name} ({part['seconds']} s)\n\n| {' | '.join(columns)} |\n"
        text += "|" + "--|" * len(columns) + "\n"
        for row in rows:
            cells = (row.get(column, "") for column in columns)
            text += (
                f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |\n"
            )
    return text


PARTS: dict[str, Callable[[str], list[Row]]] = {
    "environment": environment,
    "exactness": exactness,
    "training": training,
    "synchronisation": synchronisation,
    "step": step,
    "variants": variants,
    "throughput": throughput,
    "loading": loading,
    "loop": loop,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
