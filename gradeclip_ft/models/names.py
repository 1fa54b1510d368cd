"""EVA weights under EVA-CLIP's own names, and back: interop notes of CLIPSelf and F-ViT.

open_clip builds EVA from timm, whose names differ inside the blocks. EVA-CLIP's users load with
`strict=False`, so that a wrong name leaves a random layer without a word: both directions compare
with the complete list of names and refuse what is missing or unknown.
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
    "attn.q_proj.weight": "attn.q_proj.weight",
    "attn.k_proj.weight": "attn.k_proj.weight",
    "attn.v_proj.weight": "attn.v_proj.weight",
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
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    *_pairs("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
)
TEXT_STEM = (
    "token_embedding.weight",
    "positional_embedding",
    *_pairs("ln_final"),
    "text_projection",
)
ROPE = ("freqs_cos", "freqs_sin")


def is_evaclip(state: Mapping[str, Tensor]) -> bool:
    """Whether these are EVA-CLIP's names: blocks directly below `visual`."""
    return any(key.startswith(f"{THEIRS}blocks.") for key in state)


def to_evaclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to EVA-CLIP's; the tensors are the same objects.

    Raises:
        ValueError: A key is missing or unknown; the message names it.
    """
    table = name_table(state, OURS)
    _require(table, state, "open_clip")
    return {theirs: state[ours] for ours, theirs in table.items()}


def from_evaclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EVA-CLIP's names to open_clip's; rotary tables, which no model stores, are left out.

    Raises:
        ValueError: A key is missing or unknown; the message names it.
    """
    table = name_table(state, THEIRS)
    _require(table.values(), [key for key in state if key not in _rope(state)], "EVA-CLIP")
    return {ours: state[theirs] for ours, theirs in table.items()}


def name_table(state: Iterable[str], prefix: str) -> dict[str, str]:
    """Every name of such a model, open_clip's to EVA-CLIP's, in a fixed order.

    Args:
        state: Keys, from which layout and number of blocks are read.
        prefix: Of the image tower in these keys, `OURS` or `THEIRS`.
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
    """One more than the largest number behind the prefix; at least one block."""
    numbers = [key.removeprefix(prefix).split(".", 1)[0] for key in keys if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


def _rope(state: Iterable[str]) -> set[str]:
    """Rotary tables that EVA-CLIP may save, by their full names."""
    depth = _depth(state, f"{THEIRS}blocks.")
    homes = [f"{THEIRS}rope", *(f"{THEIRS}blocks.{index}.attn.rope" for index in range(depth))]
    return {f"{home}.{name}" for home in homes for name in ROPE}


def _require(expected: Iterable[str], got: Iterable[str], whose: str) -> None:
    wanted, present = dict.fromkeys(expected), dict.fromkeys(got)
    problems = {
        "missing": [key for key in wanted if key not in present],
        "unknown": [key for key in present if key not in wanted],
    }
    lines = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise ValueError(
            f"not the weights of an EVA model under {whose}'s names ({len(present)} tensors, "
            f"expected {len(wanted)}); {'; '.join(lines)}. EVA01 and EVA02 of open_clip fit; for "
            "other architectures use to=[openclip]"
        )


VISION_BLOCK = "visual.transformer.resblocks."
HF_TEXT_BLOCK = "transformer.resblocks."
HF_BLOCK = {
    VISION_BLOCK: "vision_model.encoder.layers.",
    HF_TEXT_BLOCK: "text_model.encoder.layers.",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
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
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
# Index tables that older releases of transformers saved.
POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names, text tower nested under `text.` or not, to those of CLIPModel.

    Raises:
        ValueError: A key has no place there, or one is missing; the message names it.
    """
    names = {key: key.removeprefix("text.") for key in state}
    if missing := [name for name in (*PLAIN, *TURNED) if name not in names.values()]:
        raise ValueError(
            f"{', '.join(missing)} missing, which transformers' CLIPModel needs; it holds ViTs of "
            "OpenAI's type. Use to=[openclip]"
        )
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = names[key]
        if name in PLAIN:
            result[PLAIN[name]] = value
        elif name in TURNED:
            result[TURNED[name]] = value.T.contiguous()
        else:
            result |= _block_to_huggingface(key, name, value)
    return result


def from_huggingface(state: Mapping[str, Tensor], *, nested: bool = False) -> dict[str, Tensor]:
    """Names of CLIPModel to open_clip's.

    Args:
        state: Tensors of a CLIPModel.
        nested: Whether the text tower stands below `text.`, as in open_clip's CustomTextCLIP.

    Raises:
        ValueError: A key is not one of CLIPModel's, or a projection is missing.
    """
    plain = {theirs: ours for ours, theirs in PLAIN.items()}
    turned = {theirs: ours for ours, theirs in TURNED.items()}
    fused: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in plain:
            result[plain[key]] = value
        elif key in turned:
            result[turned[key]] = value.T.contiguous()
        elif key not in POSITIONS:
            name, part = _block_from_huggingface(key)
            if part is None:
                result[name] = value
            else:
                fused.setdefault(name, {})[part] = value
    for name, parts in fused.items():
        if missing := [part for part in PROJECTIONS if part not in parts]:
            raise ValueError(f"{', '.join(missing)} missing for {name}; the file is incomplete")
        result[name] = torch.cat([parts[part] for part in PROJECTIONS])
    if not nested:
        return result
    image = ("visual.", "logit_scale")
    return {key if key.startswith(image) else f"text.{key}": value for key, value in result.items()}


def _block_to_huggingface(key: str, name: str, value: Tensor) -> dict[str, Tensor]:
    for ours, theirs in HF_BLOCK.items():
        index, _, rest = name.removeprefix(ours).partition(".")
        if not name.startswith(ours) or not index.isdigit():
            continue
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rsplit("_", 1)[1]
            return {
                f"{theirs}{index}.self_attn.{projection}.{kind}": part.contiguous()
                for projection, part in zip(PROJECTIONS, value.chunk(3), strict=True)
            }
        module, _, kind = rest.rpartition(".")
        if module in IN_BLOCK:
            return {f"{theirs}{index}.{IN_BLOCK[module]}.{kind}": value}
    raise ValueError(
        f"{key} has no place in transformers' CLIPModel, which holds ViTs of OpenAI's type; use "
        "to=[openclip]"
    )


def _block_from_huggingface(key: str) -> tuple[str, str | None]:
    """open_clip's name, and which of q, k, v it is a part of."""
    modules = {theirs: ours for ours, theirs in IN_BLOCK.items()}
    for ours, theirs in HF_BLOCK.items():
        index, _, rest = key.removeprefix(theirs).partition(".")
        if not key.startswith(theirs) or not index.isdigit():
            continue
        module, _, kind = rest.rpartition(".")
        if module in modules:
            return f"{ours}{index}.{modules[module]}.{kind}", None
        projection = module.removeprefix("self_attn.")
        if projection in PROJECTIONS:
            return f"{ours}{index}.attn.in_proj_{kind}", projection
    raise ValueError(
        f"{key} is no tensor of transformers' CLIPModel; give a file that CLIPModel has saved"
    )


# Options of open_clip that have a counterpart, or do not change what the weights compute.
FREE = {
    "vision_cfg": {
        "image_size",
        "patch_size",
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_dropout",
    },
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"},
}
# Options whose neutral value is not empty.
NEUTRAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}


def misfit(model: Mapping[str, Any]) -> str | None:
    """What of an open_clip architecture `transformers.CLIPModel` cannot hold; None if all fits.

    Args:
        model: The `model_cfg` of an `open_clip_config.json`.
    """
    parts = {"vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"], "": model}
    for part, options in parts.items():
        for key, value in options.items():
            if key not in FREE[part] and value and value not in NEUTRAL.get(key, ()):
                return f"{f'{part}.' if part else ''}{key}={value!r}"
    vision = model["vision_cfg"]
    if not isinstance(vision["layers"], int):
        return f"vision_cfg.layers={vision['layers']!r} (a ResNet)"
    size = vision["image_size"]
    if not isinstance(size, int) and size[0] != size[1]:
        return f"vision_cfg.image_size={size!r} (a rectangle)"
    return None


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
    vision, text = model["vision_cfg"], model["text_cfg"]
    size = vision["image_size"]
    shared = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": model["embed_dim"],
    }
    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": size if isinstance(size, int) else size[0],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **shared,
            **ends,
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
        },
    }
