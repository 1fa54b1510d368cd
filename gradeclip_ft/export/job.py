"""What every format is made from, and what each hands back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradeclip_ft.export.verify import SHOWN, Inputs
from gradeclip_ft.models.architecture import CONFIG_NAME, FOLDER, WORDS_NAME
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import open_clip_config
from gradeclip_ft.results.record import Json

TRUNK, TEXT = "timm_trunk", "text"
VOCABULARY = "vocab.json"  # of transformers
START, END = "<|startoftext|>", "<|endoftext|>"  # as transformers spells them


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        loaded: The model, in fp32.
        state: The tensors to write under open_clip's names, rounded if asked for.
        facts: See `card.facts`.
        inputs: Shown to the model and to its export.
        folder: Where the files will be; formats write into another folder first.
        form: "safetensors" or "pt", for formats that have both.
    """

    loaded: LoadedClip
    state: Mapping[str, Tensor]
    facts: Mapping[str, Json]
    inputs: Inputs
    folder: Path
    form: str = "safetensors"

    @property
    def half(self) -> bool:
        """Whether the tensors were rounded to fp16."""
        return self.facts["precision"] == "float16"


@dataclass(frozen=True)
class Written:
    """One format, written and checked.

    Attributes:
        checks: What was compared, with figures, one sentence each.
        usage: How others load it, as Markdown.
    """

    checks: tuple[str, ...]
    usage: str


def state_of(loaded: LoadedClip, *, half: bool) -> dict[str, Tensor]:
    """The model's tensors as they are written: on the CPU, contiguous, finite.

    Raises:
        ValueError: A tensor has NaN or infinite values, or values that fp16 cannot hold.
    """
    whole = loaded.clip.model.state_dict().items()
    state = {key: value.detach().cpu().contiguous() for key, value in whole}
    if broken := _not_finite(state):
        raise ValueError(
            f"weights are not finite in {len(broken)} tensors ({', '.join(broken[:SHOWN])}); the "
            "training diverged, export an earlier run"
        )
    if not half:
        return state
    rounded = {
        k: value.half() if value.is_floating_point() else value for k, value in state.items()
    }
    if broken := _not_finite(rounded):
        raise ValueError(
            f"values beyond 65504, which fp16 cannot hold, in {', '.join(broken[:SHOWN])}; export "
            "with half=false"
        )
    return rounded


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in state.items() if not bool(value.isfinite().all())]


def save_state(
    state: Mapping[str, Tensor], path: Path, facts: Mapping[str, Json] | None = None
) -> None:
    """A plain dict of tensors as .safetensors or .pt.

    Args:
        state: Contiguous tensors on the CPU.
        path: Its suffix decides.
        facts: For the header of a .safetensors, which holds strings; a .pt holds tensors alone.
    """
    if path.suffix == ".safetensors":
        note = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (facts or {}).items()}
        save_file(dict(state), path, metadata={**note, "format": "pt"})
    else:
        torch.save(dict(state), path)
    path.chmod(0o644)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file as they are stored."""
    if file.suffix == ".safetensors":
        return load_file(file)
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def write_json(content: object, path: Path) -> None:
    """JSON as people read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_description(loaded: LoadedClip, folder: Path) -> bool:
    """Write `open_clip_config.json` and the parts that it names, relative to the folder.

    Returns:
        Whether there are such parts: open_clip then loads the folder from inside of it only.
    """
    description = open_clip_config(loaded)
    model = dict(description["model_cfg"])
    parts = False
    if (words := loaded.architecture.vocabulary) is not None:
        write_json(list(words), folder / WORDS_NAME)
    trunk = model["vision_cfg"].get("timm_model_name") or ""
    if trunk.startswith(FOLDER):
        (folder / TRUNK).mkdir()
        shutil.copy(Path(trunk.removeprefix(FOLDER)) / "config.json", folder / TRUNK)
        model["vision_cfg"] = {**model["vision_cfg"], "timm_model_name": f"{FOLDER}{TRUNK}"}
        parts = True
    tokenizer = loaded.tokenizer.tokenize
    if isinstance(tokenizer, HFTokenizer):
        # open_clip looks for it here, whatever name the description has.
        tokenizer.tokenizer.save_pretrained(folder)
        model["text_cfg"] = {**model["text_cfg"], "hf_tokenizer_name": "."}
    if "hf_model_name" in model["text_cfg"]:
        loaded.clip.model.text.config.save_pretrained(folder / TEXT)
        names = {"hf_model_name": TEXT, "hf_model_pretrained": False}
        model["text_cfg"] = {**model["text_cfg"], **names}
        parts = True
    write_json({**description, "model_cfg": model}, folder / CONFIG_NAME)
    return parts


def write_clip_tokenizer(loaded: LoadedClip, folder: Path) -> None:
    """CLIP's byte-pair tokenizer as `transformers.CLIPTokenizer` reads it; no other one."""
    tokenizer = loaded.tokenizer.tokenize
    if not isinstance(tokenizer, SimpleTokenizer):
        return
    tokens: dict[str, Any] = dict(tokenizer.encoder)
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    tokens[START], tokens[END] = tokens.pop(start), tokens.pop(end)
    ordered = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges = "\n".join(" ".join(pair) for pair in ordered)
    write_json(tokens, folder / VOCABULARY)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(special, folder / "special_tokens_map.json")
    kind = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": loaded.tokenizer.context_length,
    }
    write_json({**special, **kind}, folder / "tokenizer_config.json")
