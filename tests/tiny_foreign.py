"""Small random classifiers and BLIPs, and their libraries' own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from gradeclip_ft.models.other.classifier import Classifier, ImageModel
from tests.explain.oracle import Seen, written_out
from tests.tiny import TRUNK

CLASSES = 7
WORDS = ("a", "red", "circle", "left", "of", "two", "star", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLOCK = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def _torchvision(**changes: Any) -> nn.Module:
    settings = {"mlp_dim": 64, "num_classes": CLASSES, **changes}
    return VisionTransformer(32, 8, 2, 4, 32, **settings)


def _eva() -> nn.Module:
    settings = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
    return Eva(**TRUNK, **settings, num_classes=CLASSES, global_pool="token")


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "timm": partial(TimmVit, **TRUNK, num_classes=CLASSES),
    "timm_layer_scale": partial(TimmVit, **TRUNK, num_classes=CLASSES, init_values=0.5),
    "eva": _eva,
    "torchvision": _torchvision,
    "torchvision_two_layers": partial(_torchvision, representation_size=24),
}


def shake(model: nn.Module) -> nn.Module:
    """Biases and norms are random too, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_tiny_classifier(kind: str, seed: int = 0) -> Classifier:
    """Two layers of width 32 on a 4 x 4 grid, seven classes, in evaluation mode."""
    torch.manual_seed(seed)
    return Classifier(shake(CLASSIFIERS[kind]())).eval()


def make_tiny_blip_model(seed: int = 0) -> nn.Module:
    """A BlipForImageTextRetrieval: 32 pixels, patches of 8, embeddings of 16."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    torch.manual_seed(seed)
    text = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 24,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "sep_token_id": 3,
    }
    vision = {"image_size": 32, "patch_size": 8}
    layers = {"num_hidden_layers": 2}
    config = BlipConfig(
        text_config={**BLOCK, **layers, **text, "encoder_hidden_size": 32},
        vision_config={**BLOCK, **layers, **vision},
        image_text_hidden_size=16,
    )
    return shake(BlipForImageTextRetrieval(config))


def make_tiny_blip(seed: int = 0) -> ImageModel:
    """The same, seen through its towers."""
    from gradeclip_ft.models.other.blip import Blip

    return Blip(make_tiny_blip_model(seed)).eval()


def save_tiny_blip(folder: Path, seed: int = 0) -> nn.Module:
    """A folder as `save_pretrained` writes it, with tokenizer and image processor."""
    from transformers import BertTokenizerFast, BlipImageProcessor

    model = make_tiny_blip_model(seed)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS)), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def library_embedding(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Logits, or BLIP's image embedding, by the library's own code."""
    if hasattr(model, "vision_proj"):
        return model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
    return model(pixels)


def observed(
    model: nn.Module, *, single_head_from: int | None = None, head_scale: bool = False
) -> AbstractContextManager[list[Seen]]:
    """Attention calls of the library's own pass, in its graph."""
    if hasattr(model, "vision_proj"):
        return _watched_blip(model, single_head_from, head_scale)
    return written_out(single_head_from=single_head_from)


@contextmanager
def _watched_blip(
    model: nn.Module, single_head_from: int | None, head_scale: bool
) -> Iterator[list[Seen]]:
    """BLIP writes its attention out already; its own settings make one head of four."""
    layers = [layer.self_attn for layer in model.vision_model.encoder.layers]
    qkv: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    seen: list[Seen] = []

    def split(attention: nn.Module, joined: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Attention outputs head by head become a node of the graph."""
        outputs.append(joined[0].unflatten(2, (attention.num_heads, -1)).transpose(1, 2))
        return (outputs[-1].transpose(1, 2).flatten(2),)

    def finished(attention: nn.Module, _: object, result: tuple[torch.Tensor, ...]) -> None:
        heads, parts = attention.num_heads, qkv.pop().chunk(3, -1)
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in parts)
        seen.append(Seen(q, k, v, result[1], outputs.pop()))

    handles = []
    for index, attention in enumerate(layers):
        if single_head_from is not None and index >= single_head_from:
            attention.num_heads = 1
            attention.scale = (8 if head_scale else 32) ** -0.5
        handles += [
            attention.qkv.register_forward_hook(lambda m, i, result: qkv.append(result)),
            attention.projection.register_forward_pre_hook(
                lambda m, i, attention=attention: split(attention, i)
            ),
            attention.register_forward_hook(finished),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for attention in layers:
            attention.num_heads, attention.scale = 4, 8**-0.5
