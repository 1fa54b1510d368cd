"""Names of weights in other programs, and back: EVA-CLIP's, which F-ViT reads, and CLIPModel's.

open_clip builds EVA from timm, whose names differ inside the blocks. EVA-CLIP's users load with
`strict=False`, so that a wrong name leaves a random layer without a word. Every direction therefore
compares with the complete list of names and refuses what is missing or unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OURS = "visual.trunk."
THEIRS = "visual."
SHOWN = 5


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


SAME = {name: name for name in _pairs("norm1", "norm2", "attn.proj")}
# EVA02-B and L: separate projections, a norm inside the attention, SwiGLU.
SEPARATE = SAME | {
    **{name: name for name in (f"attn.{part}_proj.weight" for part in "qkv")},
    "attn.q_proj.bias": "attn.q_bias",
    "attn.v_proj.bias": "attn.v_bias",
    **dict(
        zip(
            _pairs("attn.norm", "mlp.fc1_g", "mlp.fc1_x", "mlp.norm", "mlp.fc2"),
            _pairs("attn.inner_attn_ln", "mlp.w1", "mlp.w2", "mlp.ffn_ln", "mlp.w3"),
            strict=True,
        )
    ),
}
# EVA01-g and EVA02-E: one projection with two biases, plain MLP. Both programs say the same.
FUSED = SAME | {
    name: name
    for name in ("attn.qkv.weight", "attn.q_bias", "attn.v_bias", *_pairs("mlp.fc1", "mlp.fc2"))
}
STEM = ("cls_token", "pos_embed", *_pairs("patch_embed.proj", "norm", "head"))
TEXT_BLOCK = (
    *("attn.in_proj_weight", "attn.in_proj_bias"),
    *_pairs("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
)
TEXT_STEM = (
    *("token_embedding.weight", "positional_embedding"),
    *(*_pairs("ln_final"), "text_projection"),
)


def is_evaclip(state: Mapping[str, Tensor]) -> bool:
    """Whether these are EVA-CLIP's names: blocks directly below `visual`."""
    return any(key.startswith(f"{THEIRS}blocks.") for key in state)


def to_evaclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to EVA-CLIP's; the tensors are the same objects.

    Raises:
        ValueError: A key is missing or unknown; the message names it.
    """
    table = name_table(state, OURS)
    _require(table, state, "an EVA model under open_clip's names")
    return {theirs: state[ours] for ours, theirs in table.items()}


def from_evaclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EVA-CLIP's names to open_clip's; rotary tables, which no model stores, are left out.

    Raises:
        ValueError: A key is missing or unknown; the message names it.
    """
    table = name_table(state, THEIRS)
    blocks = range(_depth(state, f"{THEIRS}blocks."))
    homes = [f"{THEIRS}rope", *(f"{THEIRS}blocks.{index}.attn.rope" for index in blocks)]
    rope = {f"{home}.{name}" for home in homes for name in ("freqs_cos", "freqs_sin")}
    kept = [key for key in state if key not in rope]
    _require(table.values(), kept, "an EVA model under EVA-CLIP's names")
    return {ours: state[theirs] for ours, theirs in table.items()}


def name_table(state: Iterable[str], prefix: str) -> dict[str, str]:
    """Every name of a model with these keys, open_clip's to EVA-CLIP's, in a fixed order.

    `prefix` is that of the image tower in these keys, `OURS` or `THEIRS`.
    """
    keys = set(state)
    block = FUSED if f"{prefix}blocks.0.attn.qkv.weight" in keys else SEPARATE
    table = {f"{OURS}{name}": f"{THEIRS}{name}" for name in STEM}
    for index in range(_depth(keys, f"{prefix}blocks.")):
        table |= {
            f"{OURS}blocks.{index}.{ours}": f"{THEIRS}blocks.{index}.{theirs}"
            for ours, theirs in block.items()
        }
    text = [f"text.{name}" for name in TEXT_STEM]
    for index in range(_depth(keys, "text.transformer.resblocks.")):
        text += [f"text.transformer.resblocks.{index}.{name}" for name in TEXT_BLOCK]
    return table | {name: name for name in (*text, "logit_scale")}


def _depth(keys: Iterable[str], prefix: str) -> int:
    """One more than the largest number after the prefix; at least one block."""
    numbers = [key.removeprefix(prefix).split(".", 1)[0] for key in keys if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def _require(expected: Iterable[str], got: Iterable[str], whose: str) -> None:
    wanted, present = dict.fromkeys(expected), dict.fromkeys(got)
    problems = {
        "missing": [key for key in wanted if key not in present],
        "unknown": [key for key in present if key not in wanted],
    }
    if lines := listed(problems):
        raise ValueError(
            f"these are not the weights of {whose} ({len(present)} tensors, expected "
            f"{len(wanted)}); {'; '.join(lines)}. For other architectures use to=[openclip]"
        )


def listed(problems: Mapping[str, list[str]]) -> list[str]:
    """One line for each kind of problem that some names have, with the first of them."""
    return [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]


# open_clip's ViT, text tower not nested, to CLIPModel.
PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Matrices that open_clip multiplies from the right, CLIPModel's linear layers from the left.
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Index tables that older releases of transformers saved.
POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names, text tower nested under `text.` or not, to those of CLIPModel.

    Raises:
        ValueError: A key has no place there, or one is missing; the message names it.
    """
    flat = {key.removeprefix("text."): value for key, value in state.items()}
    table = _clip_table({ours: _depth(flat, ours) for ours in TOWERS})
    _require(table, flat, "a ViT of OpenAI's type, which transformers' CLIPModel holds")
    result: dict[str, Tensor] = {}
    for ours, theirs in table.items():
        value = flat[ours].T if ours in TURNED else flat[ours]
        parts = (part.contiguous() for part in value.chunk(len(theirs))) if value.ndim else (value,)
        result |= dict(zip(theirs, parts, strict=True))
    return result


def from_huggingface(state: Mapping[str, Tensor], *, nested: bool = False) -> dict[str, Tensor]:
    """Names of CLIPModel to open_clip's, with the text tower below `text.` if `nested`.

    Raises:
        ValueError: A key is not one of CLIPModel's, or one is missing.
    """
    table = _clip_table({ours: _depth(state, theirs) for ours, theirs in TOWERS.items()})
    names = [name for theirs in table.values() for name in theirs]
    _require(names, [key for key in state if key not in POSITIONS], "transformers' CLIPModel")
    result: dict[str, Tensor] = {}
    for ours, theirs in table.items():
        value = state[theirs[0]] if len(theirs) == 1 else torch.cat([state[key] for key in theirs])
        inside = nested and not ours.startswith(("visual.", "logit_scale"))
        result[f"text.{ours}" if inside else ours] = (
            value.T.contiguous() if ours in TURNED else value
        )
    return result


def _clip_table(depths: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Every name of an open_clip ViT to CLIPModel's; a fused projection to its three parts."""
    table: dict[str, tuple[str, ...]] = {
        ours: (theirs,) for ours, theirs in (PLAIN | TURNED).items()
    }
    for ours, theirs in TOWERS.items():
        for index in range(depths[ours]):
            for kind in ("weight", "bias"):
                table[f"{ours}{index}.attn.in_proj_{kind}"] = tuple(
                    f"{theirs}{index}.self_attn.{part}.{kind}" for part in PROJECTIONS
                )
                for a, b in IN_BLOCK.items():
                    table[f"{ours}{index}.{a}.{kind}"] = (f"{theirs}{index}.{b}.{kind}",)
    return table


# Options of open_clip that have a counterpart, or do not change what the weights compute.
FREE = {
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"),
    *("width", "layers", "mlp_ratio", "image_size", "patch_size", "head_width", "patch_dropout"),
    *("heads", "context_length", "vocab_size"),
}
# Options whose neutral value is not empty.
NEUTRAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}


def misfit(model: Mapping[str, Any]) -> str | None:
    """What of a `model_cfg` of open_clip `transformers.CLIPModel` cannot hold; None if all fits."""
    parts = {"vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"], "": model}
    for part, options in parts.items():
        for key, value in options.items():
            if key not in FREE and value and value not in NEUTRAL.get(key, ()):
                return f"{f'{part}.' if part else ''}{key}={value!r}"
    vision = model["vision_cfg"]
    if not isinstance(vision["layers"], int):
        return f"vision_cfg.layers={vision['layers']!r} (a ResNet)"
    size = vision["image_size"]
    if not isinstance(size, int) and size[0] != size[1]:
        return f"vision_cfg.image_size={size!r} (a rectangle)"
    return None


def stated_by_clip(config: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What the `config.json` of a CLIPModel says of its weights that their shapes do not tell.

    Args:
        config: Its content; CLIPModel's own defaults need not be in it.
        ours: A `model_cfg` of open_clip, for everything else.

    Raises:
        ValueError: open_clip's towers do not compute what it describes.
    """
    default = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    vision, text = (default | config.get(part, {}) for part in ("vision_config", "text_config"))
    acts, eps = ([part[key] for part in (vision, text)] for key in default)
    if acts[0] != acts[1] or acts[0] not in ("gelu", "quick_gelu") or set(eps) != {1e-5}:
        raise ValueError(
            f"hidden_act is {' and '.join(acts)}, layer_norm_eps {eps[0]} and {eps[1]}; open_clip "
            "computes gelu or quick_gelu in both towers, and 1e-05"
        )
    heads = {"head_width": vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12)}
    size = {"image_size": vision.get("image_size", 224)}
    return {
        **ours,
        "quick_gelu": acts[0] == "quick_gelu",
        "vision_cfg": {**ours["vision_cfg"], **heads, **size},
        "text_cfg": {**ours["text_cfg"], "heads": text.get("num_attention_heads", 8)},
    }


def clip_config(
    model: Mapping[str, Any], *, start: int, end: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Content of the `config.json` of a `transformers.CLIPModel`.

    Args:
        model: The `model_cfg` of an `open_clip_config.json`.
        start: Id of the start of a text.
        end: Id of the end of a text, whose row becomes the embedding.
        dtype: Of the stored tensors.

    Raises:
        ValueError: The architecture does not fit; says what and which format does.
    """
    if reason := misfit(model):
        raise ValueError(
            f"transformers' CLIPModel has no {reason}; it holds ViTs of OpenAI's type with square "
            "images. Use to=[openclip]"
        )
    vision, text, size = model["vision_cfg"], model["text_cfg"], model["vision_cfg"]["image_size"]

    def shared(part: Mapping[str, Any], heads: int) -> dict[str, Any]:
        return {
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": model["embed_dim"],
            "hidden_size": part["width"],
            "intermediate_size": int(part["width"] * part.get("mlp_ratio", 4.0)),
            "num_hidden_layers": part["layers"],
            "num_attention_heads": heads,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **shared(vision, vision["width"] // vision.get("head_width", 64)),
            "image_size": size if isinstance(size, int) else size[0],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **shared(text, text["heads"]),
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
        },
    }
