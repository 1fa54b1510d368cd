"""What a model folder needs beside the weights so that nothing is fetched: parts and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from gradeclip_ft.export.staging import write_json
from gradeclip_ft.models.architecture import CONFIG_NAME, FOLDER, WORDS_NAME
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.openclip import describe

TRUNK, TEXT = "timm_trunk", "text"
START, END = "<|startoftext|>", "<|endoftext|>"  # as transformers spells them


def write_description(loaded: LoadedClip, folder: Path) -> bool:
    """Write `open_clip_config.json` and the parts that it names, relative to the folder.

    Returns:
        Whether there are such parts: open_clip then loads the folder from inside of it only.
    """
    description = describe(loaded)
    model = dict(description["model_cfg"])
    parts = False
    if (words := loaded.architecture.vocabulary) is not None:
        write_json(list(words), folder / WORDS_NAME)
    trunk = model["vision_cfg"].get("timm_model_name") or ""
    if trunk.startswith(FOLDER):
        (folder / TRUNK).mkdir()
        shutil.copyfile(
            Path(trunk.removeprefix(FOLDER)) / "config.json", folder / TRUNK / "config.json"
        )
        model["vision_cfg"] = {**model["vision_cfg"], "timm_model_name": f"{FOLDER}{TRUNK}"}
        parts = True
    tokenizer = loaded.tokenizer.tokenize
    if isinstance(tokenizer, HFTokenizer):
        # open_clip looks for it here whatever name stands in the description.
        tokenizer.tokenizer.save_pretrained(folder)
        model["text_cfg"] = {**model["text_cfg"], "hf_tokenizer_name": "."}
    if "hf_model_name" in model["text_cfg"]:
        loaded.clip.model.text.config.save_pretrained(folder / TEXT)
        names = {"hf_model_name": TEXT, "hf_model_pretrained": False}
        model["text_cfg"] = {**model["text_cfg"], **names}
        parts = True
    write_json({**description, "model_cfg": model}, folder / CONFIG_NAME)
    return parts


def write_clip_tokenizer(loaded: LoadedClip, folder: Path) -> bool:
    """CLIP's byte-pair tokenizer as `transformers.CLIPTokenizer` reads it.

    Returns:
        Whether this model has that tokenizer; for others nothing is written.
    """
    tokenizer = loaded.tokenizer.tokenize
    if not isinstance(tokenizer, SimpleTokenizer):
        return False
    tokens: dict[str, Any] = dict(tokenizer.encoder)
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    tokens[START], tokens[END] = tokens.pop(start), tokens.pop(end)
    ordered = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges = "\n".join(" ".join(pair) for pair in ordered)
    write_json(tokens, folder / "vocab.json")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(special, folder / "special_tokens_map.json")
    write_json(
        {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": loaded.tokenizer.context_length,
        },
        folder / "tokenizer_config.json",
    )
    return True
