"""Weights of OpenAI-type CLIP models under the names of `transformers.CLIPModel`, and back.

Pure renaming, splitting and transposing: nothing is imported from transformers. What its CLIPModel
cannot hold is named; `huggingface_config` says beforehand whether an architecture fits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VISION_BLOCK = "visual.transformer.resblocks."
TEXT_BLOCK = "transformer.resblocks."
HF_BLOCK = {VISION_BLOCK: "vision_model.encoder.layers.", TEXT_BLOCK: "text_model.encoder.layers."}
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
