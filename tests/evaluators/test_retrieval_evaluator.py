"""Retrieval through the whole pipeline, with models whose answers are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.evaluators.pairs import RetrievalEvaluator
from gradeclip_ft.models.clip import LoadedClip
from tests.evaluators.conftest import Load


def evaluator(world: Any, **options: Any) -> RetrievalEvaluator:
    data = CaptionFile(**world.captions, split="test")
    return RetrievalEvaluator(name="retrieval", data=data, **options)


def image_table(world: Any, loaded: LoadedClip) -> Tensor:
    """What the fake image tower says of picture 0, 1, 2, ...: the perfect text table."""
    pairs = CaptionFile(**world.captions, split="test")()
    batches = pairs.pairs(loaded.transform(), loaded.tokenizer, batch_size=8, workers=0)
    images = torch.cat([batch.images for batch in batches])
    return loaded.clip.image.encode(images)


def test_a_perfect_model_scores_one_and_a_reversed_one_nothing(world: Any, load: Load) -> None:
    table = image_table(world, load())
    found = evaluator(world)(load(table=table)).metrics
    assert found == {
        f"{way}_retrieval_recall@{k}": 1.0 for way in ("image", "text") for k in (1, 5, 10)
    }
    wrong = evaluator(world)(load(table=table.roll(7, dims=0))).metrics
    assert wrong["image_retrieval_recall@1"] == wrong["text_retrieval_recall@1"] == 0.0


def test_recall_equals_a_naive_loop(world: Any, load: Load) -> None:
    table = image_table(world, load())
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    texts = table + 2.0 * noise
    found = evaluator(world)(load(table=texts)).metrics
    unit = torch.nn.functional.normalize
    scores = unit(texts, dim=1) @ unit(table, dim=1).T  # both captions of a picture are equal
    for k in (1, 5, 10):
        hits = [n in row.argsort(descending=True)[:k] for n, row in enumerate(scores)]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(sum(hits) / len(hits))
    top = [int(row.argmax()) == n for n, row in enumerate(scores.T)]
    assert found["text_retrieval_recall@1"] == pytest.approx(sum(top) / len(top))


def test_batch_sizes_do_not_change_the_numbers(world: Any, load: Load) -> None:
    noise = torch.randn(18, 192, generator=torch.Generator().manual_seed(0))
    one = evaluator(world, batch_size=1, text_batch_size=3)(load(table=noise))
    assert one == evaluator(world, batch_size=16)(load(table=noise))


def test_equal_captions_are_encoded_once(world: Any, load: Load) -> None:
    """Else rounding in different batches would decide ties by chance."""
    loaded = load(table=torch.randn(18, 192))
    evaluator(world)(loaded)
    assert loaded.clip.text.rows == 18  # of 36 captions; the fake sees their number alone


def test_uneven_captions_and_images_without_one(world: Any, load: Load, tmp_path: Path) -> None:
    """One image has four captions, one none: it is left out, counted, and shifts no index."""
    content = json.loads((world.folder / "captions.json").read_text())
    kept = [entry for entry in content["annotations"] if entry["image_id"] != 3]
    kept += [{"image_id": 5, "caption": f"{n} times picture 5"} for n in (3, 4)]
    content["annotations"] = kept
    (tmp_path / "captions.json").write_text(json.dumps(content))
    data = CaptionFile(str(tmp_path / "captions.json"), world.captions["images"], split="test")
    table = image_table(world, load())
    measured = RetrievalEvaluator(name="retrieval", data=data)(load(table=table))
    assert set(measured.metrics.values()) == {1.0}
    assert measured.data["counts"] == {
        "images": 17,
        "captions": 36,
        "skipped": {"image without caption": 1},
    }


def test_a_split_of_another_size_is_refused(world: Any, load: Load) -> None:
    """Validation and test splits are mixed up easily and give other recalls."""
    data = CaptionFile(**world.captions, split="flickr30k test", expected=1000)
    with pytest.raises(ValueError, match="lists 18 images, split flickr30k test has 1000"):
        RetrievalEvaluator(name="retrieval", data=data)(load())
