"""A fine-tuned model goes through every format that fits it, and keeps its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.commands.config import compose
from gradeclip_ft.commands.evaluate import evaluate
from gradeclip_ft.commands.export import export
from gradeclip_ft.commands.train import train

SHAPES = [
    f"{sign}evaluator.{name}.data.make.{key}={value}"
    for name in ("shapes_regions", "shapes_retrieval")
    for sign, key, value in (("", "train", 8), ("", "val", 24), ("+", "workers", 1))
]


def numbers(*model: str) -> dict[str, dict[str, float]]:
    """All metrics of one model, by evaluator."""
    folder = Path("measured") / str(len(list(Path("measured").glob("*"))))
    evaluate(compose("evaluate", [*SHAPES, f"out={folder}", *model]))
    return {path.name: json.loads(path.read_text())["metrics"] for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_every_format_of_a_fine_tuned_model_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself, open_clip's file and folder, transformers' names, a wrapped .pt."""
    monkeypatch.chdir(tmp_path)
    train(compose("train", ["+exp=smoke", "name=tuned", "evaluator=[]"]))
    export(compose("export", ["run=tuned", "to=[openclip,huggingface]", "out=out"]))
    state = load_file("runs/tuned/weights.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, "w.pt")
    expected = numbers("run=tuned")
    expected = {name.replace("@4", "@0"): found for name, found in expected.items()}
    assert len(expected) == 2
    ways = (
        ["model=folder", "model.name=out/openclip"],
        ["model=folder", "model.name=out/huggingface"],
        ["model.weights=out/openclip/open_clip_model.safetensors"],
        ["model.weights=out/huggingface/model.safetensors"],  # transformers' names
        ["model.weights=w.pt"],
        ["model.weights=out/openclip"],
    )
    for way in ways:
        assert numbers(*way) == expected, way
    assert numbers() != expected  # the untouched model has other numbers
