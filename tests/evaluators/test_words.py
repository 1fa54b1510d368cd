"""Words that leave and enter captions, and their concreteness, against loops over everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from gradeclip_ft.data.files import ImageSet
from gradeclip_ft.evaluators.words import (
    ConcretenessEvaluator,
    TextFaithfulnessEvaluator,
    changed_ranks,
    lemma_in,
    shortened,
)
from gradeclip_ft.explain.driver import explain_sentences
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.explain.rise import Rise
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.report.content import Words
from tests.evaluators.test_faithfulness import Photos

CAPTIONS = [
    ("a red circle and a blue star", "a red circle"),
    ("a green heart, a large yellow arrow", "a heart", "there is a green heart"),
    ("two things",),
    ("a cyan diamond on a striped background", "circle"),
]
METHODS = {"deep": GradEclipDeep(2, relu_at="sum", minmax_over="visible"), "raw": RawAttention()}


@pytest.fixture(scope="module")
def loaded() -> LoadedClip:
    return load_clip("shapes_tiny")


@pytest.fixture
def pairs(tmp_path: Path) -> ImageSet:
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(len(CAPTIONS))]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return ImageSet(paths, [path.name for path in paths], paths, captions=CAPTIONS)


def test_words_leave_by_importance_and_enter_in_their_own_order() -> None:
    """Marks stay behind, equal words go in order, one word is left, short captions stand still."""
    words = Words(["a", "red", ",", "big", "star", "."], {})
    values = [0.1, 0.4, 0.9, 0.1, 0.3, 0.0]
    left = shortened(words, values, "deletion", 5)
    assert left == ["a , big star .", "a , big .", ", big .", ", big .", ", big ."]
    entered = shortened(words, values, "insertion", 5)
    assert entered == ["red", "red star", "a red star", "a red big star", "a red big star"]
    assert shortened(Words(["..."], {}), [1.0], "insertion", 2) == ["", ""]
    assert shortened(Words(["..."], {}), [1.0], "deletion", 2) == ["...", "..."]


def test_ranks_are_those_of_a_double_loop() -> None:
    random = torch.Generator().manual_seed(0)
    images, texts, own = (
        normalize(torch.randn(n, 8, generator=random), dim=1) for n in (7, 20, 20)
    )
    owner = torch.arange(20) % 7
    image, text = changed_ranks(own, images, texts, owner, chunk=3)
    for t in range(20):
        score = [float(own[t] @ images[b]) for b in range(7)]
        right = score[owner[t]]
        assert image[t] == sum(value > right for value in score)
    for b in range(7):
        best = max(float(own[t] @ images[b]) for t in range(20) if owner[t] == b)
        wrong = [float(texts[t] @ images[b]) for t in range(20) if owner[t] != b]
        assert text[b] == sum(value > best for value in wrong)


@pytest.mark.parametrize("captions", ["all", "first"])
def test_curves_are_those_of_every_changed_caption(
    loaded: LoadedClip, pairs: ImageSet, captions: Any
) -> None:
    """Would catch the order of captions, owners, a method under another's name."""
    evaluator = TextFaithfulnessEvaluator(
        "w", Photos(pairs), METHODS, captions=captions, steps=3, batch_size=3
    )
    measured = evaluator(loaded)
    listed = [
        (text, b)
        for b, some in enumerate(CAPTIONS)
        for text in some[: None if captions == "all" else 1]
    ]
    images = loaded.encode_images([str(path) for path in pairs.images])
    texts = loaded.encode_texts([text for text, _ in listed])
    for method in METHODS:
        hits = np.zeros((3, len(CAPTIONS)))
        for step in range(3):
            for b in range(len(CAPTIONS)):
                own = []
                for (text, owner), plain in zip(listed, texts, strict=True):
                    if owner != b:
                        own.append(float(images[b] @ plain))
                        continue
                    (words,) = explain_sentences(loaded, [text], images[[b]], METHODS)
                    left = shortened(words, words.values[method], "deletion", 3)[step]
                    own.append(float(images[b] @ loaded.encode_texts([left])[0]))
                mine = [score for score, (_, owner) in zip(own, listed, strict=True) if owner == b]
                others = [s for s, (_, owner) in zip(own, listed, strict=True) if owner != b]
                hits[step, b] = max(mine) > max(others)
        assert measured.metrics[f"{method}/deletion_text@1"] == pytest.approx(hits.mean())
    assert measured.details["captions"] == len(listed)
    short = "captions_with_fewer_words_than_steps_and_one"
    assert measured.details[short] == sum(len(text.split()) <= 3 for text, _ in listed)
    curve = measured.details["curves"]["deep"]  # type: ignore[index,call-overload]
    assert len(curve["insertion_image@1"]["mean"]) == 3


def test_a_method_for_pictures_is_named(loaded: LoadedClip, pairs: ImageSet) -> None:
    with pytest.raises(ValueError, match="changes pixels; it explains images alone"):
        TextFaithfulnessEvaluator("w", Photos(pairs), {"rise": Rise(masks=2)})(loaded)


def test_importance_is_regressed_on_ratings(
    loaded: LoadedClip, pairs: ImageSet, tmp_path: Path
) -> None:
    """Ratings that are the importance itself have r² of 1; plurals find their singular."""
    table = tmp_path / "ratings.csv"
    table.write_text("Word,Conc.M\nred,2\nheart,5\n circle,1\nthing,3\nstar,4\n")

    def evaluate() -> Any:
        data = Photos(pairs)
        return ConcretenessEvaluator("c", data, METHODS, str(table))(loaded)

    first = evaluate()
    told = first.details["regressions"]["deep"]["words"]
    assert set(told) >= {"red", "heart", "star", "circle"}
    lines = [f"{word.removesuffix('s')},{1 + 3 * value}" for word, value in told.items()]
    table.write_text("Word,Conc.M\n" + "\n".join(lines))
    second = evaluate()
    assert second.metrics["deep/concreteness_r2"] == pytest.approx(1.0, abs=1e-3)
    slope = second.details["regressions"]["deep"]["concreteness"]["slope"]
    assert slope == pytest.approx(1 / 3, abs=1e-3)
    assert second.metrics["raw/concreteness_r2"] < 0.999
    table.write_text("Word,Conc.M\nred,2\n")
    with pytest.raises(ValueError, match=r"1 of .* frequent words have a rating"):
        evaluate()
    table.write_text("word,rating\nred,2\n")
    with pytest.raises(ValueError, match=r"no Word, Conc\.M; set word_column="):
        evaluate()
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"no ratings .*; fetch those of Brysbaert"):
        evaluate()


def test_words_are_looked_up_without_their_endings() -> None:
    rated = dict.fromkeys(("box", "pony", "run", "ride", "this"), 1.0)
    found = {word: lemma_in(word, rated) for word in ("boxes", "ponies", "running", "riding")}
    assert found == {"boxes": "box", "ponies": "pony", "running": "run", "riding": "ride"}
    assert lemma_in("is", rated) is None
