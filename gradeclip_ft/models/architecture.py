"""What a model is made of, without its weights: names of open_clip, folders, the packaged CLIP."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from importlib import resources
from json import dumps
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from gradeclip_ft.models.tower import resample_positions
from gradeclip_ft.models.trace import Foreign

PACKAGED = ("shapes_tiny", "shapes2_tiny")
ASSETS = resources.files("gradeclip_ft") / "assets"
CONFIG_NAME = "open_clip_config.json"
WORDS_NAME = "vocabulary.json"
FOLDER, HUB = "local-dir:", "hf-hub:"
PARTS = ("vision_cfg", "text_cfg")


@dataclass(frozen=True)
class Architecture:
    """Constructor arguments of an open_clip model.

    Attributes:
        name: As the user wrote it.
        model_cfg: In open_clip's form; paths are absolute.
        preprocess_cfg: Pixels in open_clip's form; empty for open_clip's defaults.
        vocabulary: Of a model whose tokens are words; None for others.
        folder: That holds description, weights and tokenizer; None where there is none.
        registered: Whether open_clip knows the name.
    """

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    vocabulary: tuple[str, ...] | None = None
    folder: Path | None = None
    registered: bool = False

    def build(self) -> Foreign:
        """The open_clip module with random weights; nothing is fetched.

        Raises:
            ValueError: A part of it is described at the model hub, which cannot be reached.
        """
        cfg = deepcopy(dict(self.model_cfg))
        cfg["text_cfg"] = {**cfg["text_cfg"]}
        nested = cfg.pop("custom_text", False)
        if "hf_model_name" in cfg["text_cfg"]:
            cfg["text_cfg"]["hf_model_pretrained"], nested = False, True
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
        try:
            return kind(**cfg) if nested else open_clip.CLIP(**cfg)
        except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name} describes a model that cannot be built ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); correct its "
                f"{CONFIG_NAME}"
            ) from error
        except OSError as error:
            raise ValueError(
                f"a part of {self.name} is described at the model hub, which cannot be reached "
                f"({str(error).splitlines()[0]}); load the model once where there is a network, "
                "save it as a folder (export to=[huggingface]) and give that folder as the name"
            ) from error


# Options that do not change what weights compute, or that the tensors themselves tell.
UNCOMPARED = {
    *("image_size", "context_length", "patch_dropout", "output_tokens", "block_type"),
    *("timm_model_name", "timm_model_pretrained", "timm_drop", "timm_drop_path"),
    *("hf_model_name", "hf_model_pretrained", "hf_tokenizer_name"),
    *("tokenizer_mode", "tokenizer_kwargs"),
}


def config_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, sizes: bool = True
) -> list[str]:
    """In words, what two `model_cfg` of open_clip compute differently with the same tensors."""
    pairs: dict[str, list[Any]] = {}
    pairs["quick_gelu"] = [bool(cfg.get("quick_gelu")) for cfg in (ours, theirs)]
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        known = {field.name: field.default for field in fields(kind)}
        both = [{**known, **cfg[part]} for cfg in (ours, theirs)]
        compared = [key for key in known if key not in UNCOMPARED]
        pairs |= {f"{part}.{key}": [cfg[key] for cfg in both] for key in compared}
        if sizes and part == "vision_cfg":
            pairs["image_size"] = [pair(cfg["image_size"]) for cfg in both]
    # As JSON, because a tuple and a list are the same here.
    return [f"{key} {b!r}, not {a!r}" for key, (a, b) in pairs.items() if dumps(a) != dumps(b)]


def check_stated(
    architecture: Architecture, stated: Mapping[str, Any], source: str, *, sizes: bool
) -> None:
    """Refuse weights of `source` that are stated to be of another architecture; name theirs.

    The tensors of two architectures may have the same names and shapes, and compute other things:
    by their activation, heads, pooling or epsilon. Sizes of images need not agree where the user
    has chosen one.
    """
    if found := config_differences(architecture.model_cfg, stated, sizes=sizes):
        known = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
        close = [name for name, cfg in known.items() if not config_differences(cfg, stated)]
        remedy = f"give name={close[0]}" if close else "give their own folder as the name"
        size = f", or image_size={stated['vision_cfg'].get('image_size', 224)}"
        raise ValueError(
            f"{source} says of its weights: {'; '.join(found)} as in {architecture.name}. {remedy}"
            + (size if all("image_size" in one for one in found) else "")
        )


def find_architecture(name: str) -> Architecture:
    """The architecture of a name of open_clip, a packaged model, a folder or a hub repository.

    Raises:
        ValueError: Unknown name, or a folder without description.
        FileNotFoundError: No such folder.
    """
    if name in PACKAGED:
        own = json.loads((ASSETS / f"{name}.json").read_text("utf-8"))
        words = tuple(own["vocabulary"])
        return Architecture(name, own["model_cfg"], own["preprocess_cfg"], vocabulary=words)
    if name.startswith(HUB):
        return _from_folder(name, fetch_repository(name.removeprefix(HUB)))
    if name.startswith(FOLDER) or Path(name).is_dir():
        return _from_folder(name, Path(name.removeprefix(FOLDER)))
    if "/" in name:
        raise FileNotFoundError(
            f"no folder {name}; give a folder with {CONFIG_NAME}, or a name such as ViT-B-16"
        )
    config = open_clip.get_model_config(name)
    if config is None:
        known = [*PACKAGED, *open_clip.list_models()]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(close) or 'ViT-B-16'}? "
            "`open_clip.list_models()` lists all; a folder with "
            f"{CONFIG_NAME} is a model too"
        )
    return Architecture(name, config, {}, registered=True)


def _from_folder(name: str, folder: Path) -> Architecture:
    """A folder in open_clip's layout; parts that are folders inside it become absolute paths."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one that holds {CONFIG_NAME}")
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{folder} has no {CONFIG_NAME} (it holds {inside}), expected open_clip's folder "
            "layout; to take only weights from it, name the architecture and give the folder as "
            "weights="
        )
    model_cfg, preprocess_cfg = read_description(path)
    vision, text = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    trunk = vision.get("timm_model_name")
    if isinstance(trunk, str) and trunk.startswith(FOLDER):
        vision["timm_model_name"] = f"{FOLDER}{folder / trunk.removeprefix(FOLDER)}"
    for key in ("hf_model_name", "hf_tokenizer_name"):
        inside = text[key].removeprefix(FOLDER) if isinstance(text.get(key), str) else ""
        if inside and (folder / inside).is_dir():
            text[key] = str(folder / inside)
    words = folder / WORDS_NAME
    return Architecture(
        name,
        {**model_cfg, "vision_cfg": vision, "text_cfg": text},
        preprocess_cfg,
        vocabulary=tuple(read_json(words)) if words.is_file() else None,
        folder=folder,
    )


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model_cfg` and the `preprocess_cfg` of an `open_clip_config.json`."""
    config = read_json(path)
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    parts = [model_cfg.get(part) for part in PARTS] if isinstance(model_cfg, dict) else [None]
    if not isinstance(model_cfg, dict) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{path} has no model_cfg with {' and '.join(PARTS)}; write it with open_clip, or "
            "export again"
        )
    return model_cfg, config.get("preprocess_cfg") or {}


def fetch_repository(repository: str) -> Path:
    """A repository of the model hub, as a folder."""
    from huggingface_hub import snapshot_download

    kept = ["*.json", "*.safetensors", "*.txt", "*.model", "open_clip_pytorch_model.bin"]
    try:
        return Path(snapshot_download(repository, allow_patterns=kept))
    except Exception as error:  # whatever the network says, the remedy is the same
        raise ValueError(
            f"{HUB}{repository} cannot be fetched ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); download the repository where there is a network and "
            "give its folder as the name"
        ) from error


def read_json(path: Path) -> Any:
    """Content of a file; a ValueError where it is not complete JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not complete JSON ({error}); write it again") from error


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or of two; a ValueError for anything else."""
    sides = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image size is {size}, expected a side or (height, width) in pixels")
    return sides[0], sides[1]


def checked_size(
    wanted: int | Sequence[int] | None, own: int | Sequence[int], patch: int, name: str
) -> tuple[int, int]:
    """(height, width) of the images that the model of this name gets: as wanted, or its own.

    Raises:
        ValueError: A side is not a multiple of the patch, whose side is 0 where unknown.
    """
    height, width = size = pair(own if wanted is None else wanted)
    if patch and (height % patch or width % patch):
        wrong = height if height % patch else width
        below = wrong // patch * patch
        raise ValueError(
            f"image size {wrong} is not a multiple of the patch size {patch} of {name}; use "
            f"{below or patch} or {below + patch}"
        )
    return size


def set_image_size(model: Foreign, size: int | Sequence[int] | None) -> None:
    """Resize a native ViT's table of positions; tell trunks without one what to expect.

    Sides that are not a multiple of the patch are left to the caller's check.
    """
    if size is None:
        return
    visual, (height, width) = model.visual, pair(size)
    if isinstance(visual, VisionTransformer):
        grid = (height // visual.patch_size[0], width // visual.patch_size[1])
        if min(grid) < 1:
            return
        table = visual.positional_embedding
        rows = resample_positions(table.data, tuple(visual.grid_size), grid)
        visual.positional_embedding = nn.Parameter(rows, requires_grad=table.requires_grad)
        visual.grid_size, visual.image_size = grid, (height, width)
    elif isinstance(visual, TimmModel) and not hasattr(visual.trunk, "pos_embed"):
        visual.set_input_size((height, width))
