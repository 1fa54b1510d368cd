"""EVA weights under EVA-CLIP's own names, and back: interop notes of CLIPSelf and F-ViT.

open_clip builds EVA from timm, whose names differ inside the blocks. EVA-CLIP's users load with
`strict=False`, so that a wrong name leaves a random layer without a word: both directions compare
with the complete list of names and refuse what is missing or unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
