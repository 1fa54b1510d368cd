"""Fuzzing of weights files and configurations: they load, or one documented error says why not."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from omegaconf import OmegaConf
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gradeclip_ft.commands.config import check, compose, recorded
from gradeclip_ft.models.weights import load_state, read_state
from tools import mutate

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
NAMES = (
    "state_dict",
    "model",
    "module",
    "epoch",
    "visual.blocks.0.x",
    "vision_model.embeddings.class_embedding",
)


@cache
def model() -> Any:
    """A CLIP of one layer."""
    torch.manual_seed(0)
    return open_clip.CLIP(8, VISION, TEXT)


class Hostile:
    """Unpickles to a call."""

    def __init__(self, rng: random.Random) -> None:
        self.call = rng.choice(
            (
                (os.system, ("touch fuzz-was-here",)),
                (eval, ("open('fuzz-was-here', 'w')",)),
                (torch.load, ("/etc/passwd",)),
                (exec, ("import os; os.system('touch fuzz-was-here')",)),
                (torch.zeros, ((2**40,),)),
                (OrderedDict, (5,)),
                (bytearray, (2**45,)),
            )
        )

    def __reduce__(self) -> Any:
        return self.call


def checkpoint_input(rng: random.Random, folder: Path) -> Path:
    """A weights file with other content, a damaged one, or one that attacks."""
    state = _state(rng)
    plain = all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided
        for k, v in state.items()
    )
    if rng.random() < 0.45 and plain:
        path = folder / "input.safetensors"
        contiguous = {
            k: v.contiguous().clone() if v.numel() < 10**6 else torch.zeros(1)
            for k, v in state.items()
        }
        data = to_safetensors(contiguous)
        data = _header_changed(data, rng) if rng.random() < 0.4 else data
    else:
        path = folder / rng.choice(("input.pt", "input.ckpt", "input.bin"))
        data = _saved(state, rng)
    path.write_bytes(mutate.bytes_changed(data, rng) if rng.random() < 0.6 else data)
    return path


def _state(rng: random.Random) -> dict[Any, Any]:
    state: dict[Any, Any] = {key: value.clone() for key, value in model().state_dict().items()}
    for _ in range(rng.choice((0, 0, 1, 2))):
        key = rng.choice(list(state))
        if isinstance(state[key], Tensor) and state[key].numel() > 10**6:
            continue  # claims terabytes already
        match rng.randrange(8):
            case 0:
                del state[key]
            case 1:
                state[rng.choice((*NAMES, 3, None, key + ".x"))] = state.pop(key)
            case 2:
                state[key] = torch.full((rng.choice((0, 1, 5)),) * rng.randrange(4), torch.nan)
            case 3:
                state[key] = torch.zeros(1).expand(rng.choice((10**9, 10**12)), 16)
            case 4:
                state[key] = state[key].to(
                    rng.choice((torch.half, torch.int8, torch.complex64, torch.bool))
                )
            case 5:
                state[key] = rng.choice((1, "x", None, [state[key]], {"a": state[key]}))
            case 6:
                state[key] = torch.eye(4).to_sparse()
            case 7:
                state[key] = (
                    torch.full_like(state[key], torch.inf) if state[key].is_floating_point() else 0
                )
    return state


def _saved(state: dict[Any, Any], rng: random.Random) -> bytes:
    content: Any = state
    if rng.random() < 0.4:
        content = {rng.choice(NAMES): state, "epoch": 3}
    if rng.random() < 0.2:
        content = {**content, "hyper_parameters": Hostile(rng)}
    file = io.BytesIO()
    if rng.random() < 0.1:
        return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = file.getvalue()
    return _zip_changed(data, rng) if data[:2] == b"PK" and rng.random() < 0.5 else data


def _zip_changed(data: bytes, rng: random.Random) -> bytes:
    """Damage inside a member, packed again with a right checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(
            [name for name in old.namelist() if name.endswith("data.pkl")] + old.namelist()[:3]
        )
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate.bytes_changed(content, rng) if name == chosen else content)
    return out.getvalue()


def _header_changed(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate.changed(json.loads(data[8 : 8 + size]), rng)).encode()
    claimed = len(header) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**64 - 1, 10**8))
    return claimed.to_bytes(8, "little") + header + data[8 + size :]


def run_checkpoint(path: Path) -> str:
    """Read and load; whoever is refused must leave the model as it was."""
    load_state(model(), read_state(path), str(path))
    if any(not value.isfinite().all() for value in model().state_dict().values()):
        raise AssertionError("values that are not finite were loaded")
    return "loaded"


@cache
def _known() -> dict[str, Any]:
    return recorded(compose("train", ["name=a"]))


def config_input(rng: random.Random, folder: Path) -> Path:
    """The configuration of a run as somebody else may have written it."""
    node = _known()
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = mutate.changed(node, rng)
    path = folder / "input.yaml"
    path.write_text(json.dumps(node))
    return path


def run_config(path: Path) -> str:
    """Read, check, and write into a record."""
    try:
        cfg = OmegaConf.create(json.loads(path.read_text()))
    except Exception as error:  # not ours: it is no configuration at all
        return f"no yaml: {type(error).__name__}"
    check(cfg, "train")
    recorded(cfg)
    return "accepted"


def override_input(rng: random.Random, folder: Path) -> Path:
    """Arguments of a command line."""
    keys = [key for key, _ in _dotted(_known())]
    chosen = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(
            (*keys, "exp", "data", "hydra.run.dir", "model", "trainer", "data._target_")
        )
        if rng.random() < 0.3:
            key = mutate.bytes_changed(key.encode(), rng).decode("utf-8", "replace")
        if rng.random() < 0.2:
            key += rng.choice((".x", "._target_", "@y", "[0]"))
        word = str(mutate.value(rng)) if rng.random() < 0.7 else mutate.text(rng)
        chosen.append(f"{rng.choice(('', '', '', '+', '++', '~'))}{key}={word[:200]}")
    path = folder / "input.json"
    path.write_text(json.dumps(chosen))
    return path


def run_override(path: Path) -> str:
    """Compose and check."""
    cfg = compose("train", ["name=a", *json.loads(path.read_text())])
    check(cfg, "train")
    return "accepted"


def _dotted(node: dict[str, Any], start: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in node.items():
        name = f"{start}.{key}" if start else key
        found.append((name, value))
        if isinstance(value, dict):
            found += _dotted(value, name)
    return found
