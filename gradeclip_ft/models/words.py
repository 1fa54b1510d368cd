"""What a tokenizer makes of each word: so that relevance per token becomes relevance per word."""

from __future__ import annotations

from dataclasses import dataclass

from gradeclip_ft.models.tower import Foreign

STARTS = ("Ġ", "▁")  # byte-level and sentence pieces: the mark of a word's first piece
CONTINUES = "##"  # word pieces: the mark of every other piece
ENDS = "</w>"  # CLIP's own: the mark of a word's last piece


@dataclass(frozen=True)
class Word:
    """One word of a text.

    Attributes:
        text: As the tokenizer gives it back: lower-cased or cleaned where it does so.
        pieces: Tokens that it became.
    """

    text: str
    pieces: int


def words_of(tokenizer: Foreign, text: str) -> list[Word]:
    """Words of a text and the tokens of each, without those that mark start and end.

    Args:
        tokenizer: Open_clip's own, its wrapper around transformers, or one with `words` itself.
        text: Of any length.

    Raises:
        ValueError: The tokenizer is of another kind.
    """
    if hasattr(tokenizer, "words"):
        found: list[Word] = tokenizer.words(text)
        return found
    if hasattr(tokenizer, "decoder"):
        return _of_clip(tokenizer, text)
    if hasattr(getattr(tokenizer, "tokenizer", None), "convert_ids_to_tokens"):
        return _of_hugging_face(tokenizer, text)
    raise ValueError(
        f"{type(tokenizer).__name__} does not say which tokens make a word; expected open_clip's "
        "tokenizer, one of transformers, or one with a method words(text)"
    )


def _of_clip(tokenizer: Foreign, text: str) -> list[Word]:
    """Words by open_clip's own tokenizer (byte pairs whose last piece ends a word)."""
    ids = tokenizer.encode(tokenizer.clean_fn(text))
    words: list[Word] = []
    first = 0
    for end, token in enumerate(ids, start=1):
        if tokenizer.decoder[token].endswith(ENDS) or end == len(ids):
            words.append(Word(tokenizer.decode(ids[first:end]).strip(), end - first))
            first = end
    return words


def _of_hugging_face(tokenizer: Foreign, text: str) -> list[Word]:
    """Words by a tokenizer of transformers inside open_clip's wrapper."""
    inner = tokenizer.tokenizer
    pieces = inner.convert_ids_to_tokens(
        inner(tokenizer.clean_fn(text), add_special_tokens=False, truncation=False)["input_ids"]
    )
    probe = inner.convert_ids_to_tokens(inner("a a", add_special_tokens=False)["input_ids"])
    marked = any(piece.startswith(STARTS) for piece in [*pieces, *probe])
    groups: list[list[str]] = []
    for piece in pieces:
        first = piece.startswith(STARTS) if marked else not piece.startswith(CONTINUES)
        if first or not groups:
            groups.append([])
        groups[-1].append(piece)
    return [Word(inner.convert_tokens_to_string(group).strip(), len(group)) for group in groups]
