"""Region classification through the whole pipeline, with models whose answers are known."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.heatmap import pool_boxes, pool_masks

Load = Callable[..., LoadedClip]
PROMPT = ["a photo of the {}."]


def names(*groups: str) -> set[str]:
    """Metrics of every region evaluation."""
    found = {f"{group}/{end}{k}" for group in groups for end in ("top", "rest_top") for k in (1, 5)}
    found |= {f"{group}/mrr" for group in groups}
    return found | {f"{group}/among_stuff_top1" for group in groups if group.startswith("stuff")}


def evaluator(world: Any, **options: Any) -> RegionEvaluator:
    keys = {"mask_antialias", "min_area", "crowd", "max_regions", "squash"}
    data = {key: options.pop(key) for key in keys & set(options)}
    settings = {"name": "regions", "templates": PROMPT, **options}
    return RegionEvaluator(data=CocoRegions(**world.panoptic, **data), **settings)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (336, 14)])
@pytest.mark.parametrize("antialias", [True, False])
def test_a_perfect_model_scores_one(
    world: Any, load: Load, size: int, patch: int, antialias: bool
) -> None:
    """Pictures are wide, high and square; any slip of the geometry costs accuracy."""
    measured = evaluator(world, mask_antialias=antialias)(load(size, patch))
    assert set(measured.metrics.values()) == {1.0}
    groups = ("boxes", "thing_masks", "stuff_masks", "stuff_boxes")
    assert set(measured.metrics) == names(*groups)
    assert measured.details["empty_masks"] == 0


@torch.no_grad()
def test_a_squashed_picture_keeps_its_regions_and_the_protocol_says_so(
    world: Any, load: Load
) -> None:
    """FG-CLIP's square without padding: boxes and masks are stretched with the pixels."""
    measured = evaluator(world, squash=True, mask_antialias=False, dense="naclip")(load(224, 16))
    assert set(measured.metrics.values()) == {1.0}
    assert measured.protocol["letterbox"] == "bicubic, squashed to the square"
    assert measured.protocol["dense"] == "naclip"
    assert "dense" not in evaluator(world).protocol  # results of before keep their protocol


@pytest.fixture
def six(world: Any, tmp_path: Path) -> dict[str, str]:
    """One picture of each shape."""
    content = json.loads((world.folder / "panoptic.json").read_text())
    short = {**content, **{key: content[key][:6] for key in ("images", "annotations")}}
    (tmp_path / "panoptic.json").write_text(json.dumps(short))
    return {**world.panoptic, "annotations": str(tmp_path / "panoptic.json")}


@pytest.mark.parametrize(("size", "patch"), [(1024, 16), (896, 14)])
def test_perfect_and_worst_at_the_sizes_of_the_literature(
    six: dict[str, str], load: Load, size: int, patch: int
) -> None:
    """Boxes, masks and crops: one for the perfect model, nothing for shuffled names."""
    data = CocoRegions(**six, clipself=size == 896)
    regions = RegionEvaluator("r", data, size, templates=PROMPT, batch_size=2, crops=True)
    groups = ("boxes", "thing_masks", "stuff_masks", "stuff_boxes", "crops", "stuff_crops")
    perfect = regions(load(224, patch, whole=True))
    assert set(perfect.metrics) == names(*groups)
    assert set(perfect.metrics.values()) == {1.0}
    assert perfect.protocol["grid"] == 64
    shuffled = load(224, patch, whole=True, table=torch.eye(17).roll(1, dims=0))
    worst = regions(shuffled).metrics
    assert {value for key, value in worst.items() if key.endswith("top1")} == {0.0}


@pytest.mark.parametrize("size", [224, 1024])
def test_constant_features_give_chance(six: dict[str, str], load: Load, size: int) -> None:
    """Every region gets the same class, so exactly one class of those present is right."""
    loaded = load(size, 16, table=torch.ones(17, 17))
    measured = RegionEvaluator("r", CocoRegions(**six), templates=PROMPT, batch_size=2)(loaded)
    present = measured.details["classes_present"]
    assert isinstance(present, dict)
    assert measured.metrics["boxes/top1"] == pytest.approx(1 / present["boxes"])
    assert measured.metrics["thing_masks/top1"] == pytest.approx(1 / present["thing_masks"])
    assert measured.metrics["stuff_masks/top1"] == 0.0  # "thing 0" comes first


def test_micro_counts_regions_and_class_mean_classes(world: Any, load: Load) -> None:
    """By the table of classes, recounted here."""
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(3))
    measured = evaluator(world, micro=True)(load(table=table))
    rows = measured.details["by_class"]["boxes"].values()  # type: ignore[index,call-overload,union-attr]
    samples = sum(row["samples"] for row in rows)
    right = sum(row["samples"] * row["top1"] for row in rows)
    assert measured.metrics["boxes/micro_top1"] == pytest.approx(right / samples, abs=1e-4)
    assert measured.metrics["boxes/top1"] == pytest.approx(
        sum(row["top1"] for row in rows) / len(rows), abs=1e-4
    )
    assert measured.metrics["boxes/micro_top1"] != pytest.approx(measured.metrics["boxes/top1"])


def test_numbers_beside_the_accuracy_are_those_of_a_recount(world: Any, load: Load) -> None:
    """Region by region from the features, with plain sorting: no rank, no mask of classes.

    "thing 3" has two words, so `parts` asks for the number among things, and for "thing" among the
    classes of one number.
    """
    table = torch.eye(17) + torch.randn(17, 17, generator=torch.Generator().manual_seed(3)) / 2
    loaded = load(table=table)
    measured = evaluator(world, micro=True, parts=["noun", "number"])(loaded)
    how = {"image_size": 224, "patch": 16, "mean": loaded.mean, "std": loaded.std}
    rows: dict[str, list[tuple[int, list[int]]]] = {"boxes": [], "stuff_masks": []}
    for batch in CocoRegions(**world.panoptic)(**how).batches(1, 0):
        dense = loaded.clip.image.dense(batch.images)
        texts = torch.nn.functional.normalize(table, dim=1)
        boxes = pool_boxes(dense, batch.boxes, batch.owner) @ texts.T
        masks = pool_masks(dense, batch.masks, batch.owner) @ texts.T
        for label, thing, box, mask in zip(batch.labels, batch.is_thing, boxes, masks, strict=True):
            order = (box if thing else mask).argsort(descending=True).tolist()
            rows["boxes" if thing else "stuff_masks"].append((int(label), order))

    def mean(found: list[tuple[int, float]]) -> float:
        by_class: dict[int, list[float]] = {}
        for label, value in found:
            by_class.setdefault(label, []).append(value)
        return fmean(map(fmean, by_class.values()))

    for group, some in rows.items():
        most = Counter(label for label, _ in some).most_common()
        most_label = min(label for label, count in most if count == most[0][1])
        rest = [(label, float(order[0] == label)) for label, order in some if label != most_label]
        inverse = [(label, 1 / (order.index(label) + 1)) for label, order in some]
        assert measured.metrics[f"{group}/rest_top1"] == pytest.approx(mean(rest))
        assert measured.metrics[f"{group}/mrr"] == pytest.approx(mean(inverse))
        assert measured.metrics[f"{group}/micro_mrr"] == pytest.approx(fmean(x for _, x in inverse))
    stuff = [
        (label, float(next(n for n in order if n >= 12) == label))
        for label, order in rows["stuff_masks"]
    ]
    assert measured.metrics["stuff_masks/among_stuff_top1"] == pytest.approx(mean(stuff))
    things = [
        (label, float(next(n for n in order if n < 12) == label)) for label, order in rows["boxes"]
    ]
    assert measured.metrics["boxes/number_given_noun"] == pytest.approx(mean(things))
    assert measured.metrics["boxes/noun_given_number"] == 1.0
    assert mean(things) != mean(
        [(label, float(order[0] == label)) for label, order in rows["boxes"]]
    )


def test_samples_name_picture_class_and_rank_of_every_region(world: Any, load: Load) -> None:
    """What intervals over pictures are made of gives the accuracy again."""
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(3))
    measured = evaluator(world, micro=True, batch_size=5)(load(table=table))
    samples: Any = measured.details["samples"]
    columns = {key: list(map(int, text.split())) for key, text in samples["boxes"].items()}
    told = [label for regions in world.rectangles.values() for label, *_ in regions if label < 12]
    assert columns["label"] == told
    pictures = [
        n for n, regions in enumerate(world.rectangles.values()) for r in regions if r[0] < 12
    ]
    assert columns["image"] == pictures
    right = fmean(rank < 1 for rank in columns["rank"])
    assert measured.metrics["boxes/micro_top1"] == pytest.approx(right)


def test_parts_need_names_of_so_many_words(world: Any, load: Load) -> None:
    with pytest.raises(ValueError, match=r"'thing 0' has 2 words; leave parts empty"):
        evaluator(world, parts=["colour", "size", "shape"])(load())


def test_confused_pairs_name_truth_and_guess(world: Any, load: Load) -> None:
    """Every name on its neighbour's axis: class n is always taken for class n + 1."""
    measured = evaluator(world)(load(table=torch.eye(17).roll(1, dims=0)))
    pairs = measured.details["most_confused"]["stuff_masks"]  # type: ignore[index,call-overload]
    found = {(pair["is"], pair["taken for"]): pair["samples"] for pair in pairs}
    assert found["stuff 0", "stuff 1"] == 4
    assert sum(found.values()) == 18
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_crops_of_things_are_enlarged_and_those_of_stuff_are_not(world: Any, load: Load) -> None:
    """Enlarged crops show neighbours: the share of the own class falls to about 1 / 1.25^2."""
    loaded = load(whole=True)
    pixels = {"image_size": 224, "patch": 16, "mean": loaded.mean, "std": loaded.std}
    regions = CocoRegions(**world.panoptic)(**pixels, crop_size=224)
    (batch, *_) = list(regions.batches(6, 0))
    assert batch.crops is not None
    share = loaded.clip.image.dense(batch.crops).sum((1, 2))
    own = share[torch.arange(len(share)), batch.labels] / share.sum(1)
    assert own[batch.is_thing].max() < 0.75
    assert own[batch.is_thing].min() > 0.5
    assert own[~batch.is_thing].min() > 0.99
    assert next(iter(CocoRegions(**world.panoptic)(**pixels).batches(6, 0))).crops is None


@pytest.mark.parametrize("outline", [{}, {"segmentation": []}, {"segmentation": None}])
def test_boxes_alone_are_measured_without_masks(
    six: dict[str, str], load: Load, tmp_path: Path, outline: dict[str, Any]
) -> None:
    """Empty masks in their place would be an accuracy of the first class."""
    content = json.loads(Path(six["annotations"]).read_text())
    regions = [
        {**segment, "image_id": entry["image_id"], **outline}
        for entry in content["annotations"]
        for segment in entry["segments_info"]
    ]
    (tmp_path / "boxes.json").write_text(json.dumps({**content, "annotations": regions}))
    data = CocoRegions(str(tmp_path / "boxes.json"), six["images"])
    measured = RegionEvaluator("r", data, templates=PROMPT, crops=True)(load(whole=True))
    groups = ("boxes", "stuff_boxes", "crops", "stuff_crops")
    assert set(measured.metrics) == names(*groups)
    assert set(measured.metrics.values()) == {1.0}
    assert measured.data["counts"]["skipped"] == {"masks, because regions have none": len(regions)}


def test_a_subset_is_drawn_by_seed_and_named(world: Any, load: Load) -> None:
    """During training: the same images at every evaluation, and not to be taken for the whole."""

    def part(seed: int) -> Any:
        return RegionEvaluator(
            "r", CocoRegions(**world.panoptic, limit=7, limit_seed=seed), templates=PROMPT
        )(load())

    first, again, other = part(0), part(0), part(1)
    assert first.data == again.data
    assert first.data["counts"]["images"] == 7
    assert first.data["hash"] != other.data["hash"]
    assert first.protocol["subset"] == "7 images drawn with seed 0"
    with pytest.raises(ValueError, match="limit is 0; give 1 image or more"):
        CocoRegions(**world.panoptic, limit=0)(
            image_size=64, patch=8, mean=(0.0,) * 3, std=(1.0,) * 3
        )


def test_region_features_hold_their_class_and_little_else(world: Any, load: Load) -> None:
    """Sharper than accuracy: a shift by one cell would already show in the shares."""
    loaded = load(224, 16)
    regions = CocoRegions(**world.panoptic, mask_antialias=False)(
        image_size=224, patch=16, mean=loaded.mean, std=loaded.std
    )
    own: dict[str, list[float]] = {"box": [], "mask": [], "shifted": []}
    for batch in regions.batches(8, 0):
        dense = loaded.clip.image.dense(batch.images)
        rows = torch.arange(len(batch.labels))
        own["box"] += pool_boxes(dense, batch.boxes, batch.owner)[rows, batch.labels].tolist()
        own["mask"] += pool_masks(dense, batch.masks, batch.owner)[rows, batch.labels].tolist()
        moved = pool_boxes(dense.roll(1, dims=2), batch.boxes, batch.owner)
        own["shifted"] += moved[rows, batch.labels].tolist()
    assert min(own["box"]) > 0.95
    assert min(own["mask"]) > 0.85
    mean = {key: sum(values) / len(values) for key, values in own.items()}
    assert mean["box"] > 0.99 > mean["shifted"] + 0.01


def test_a_blind_model_is_near_chance(world: Any, load: Load) -> None:
    """Chance of 17 classes is 0.059; 50 things give a standard error of about 0.035."""
    measured = evaluator(world)(load(blind=True))
    assert measured.metrics["boxes/top1"] < 0.2
    assert 0.1 < measured.metrics["boxes/top5"] < 0.5


def test_boxes_and_mask_accuracy_equal_a_naive_loop(world: Any, load: Load) -> None:
    """Regions straight from the annotation file, pooled cell by cell, counted class by class."""
    loaded = load(224, 16)
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(3))
    loaded = load(table=table)
    measured = evaluator(world, mask_antialias=False)(loaded)
    classes = torch.nn.functional.normalize(table, dim=1)
    regions = CocoRegions(**world.panoptic, mask_antialias=False)(
        image_size=224, patch=16, mean=loaded.mean, std=loaded.std
    )
    hits: dict[tuple[str, int], list[bool]] = {}
    for index in range(len(regions)):
        sample = regions[index]
        tokens = loaded.clip.image.dense(sample.image.unsqueeze(0))[0]  # (14, 14, K)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        for row in range(len(sample.labels)):
            total = torch.zeros(17)
            for y in range(14):
                for x in range(14):
                    total += tokens[y, x] * sample.masks[row, y, x]
            label = int(sample.labels[row])
            group = "thing_masks" if bool(sample.is_thing[row]) else "stuff_masks"
            best = int((classes @ total).argmax())
            hits.setdefault((group, label), []).append(best == label)
    for group in ("thing_masks", "stuff_masks"):
        shares = [sum(v) / len(v) for (name, _), v in hits.items() if name == group]
        assert measured.metrics[f"{group}/top1"] == pytest.approx(sum(shares) / len(shares))


def test_batch_size_does_not_change_the_numbers(world: Any, load: Load) -> None:
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(3))
    one = evaluator(world, batch_size=1)(load(table=table))
    many = evaluator(world, batch_size=16)(load(table=table))
    assert one == many


def test_mode_gradients_and_random_state_stay_as_they_were(world: Any, load: Load) -> None:
    """A loader without its own generator would move torch's random state, and so the training."""
    loaded = load()
    before = [module.training for module in loaded.clip.modules()]
    state = torch.get_rng_state()
    evaluator(world)(loaded)
    assert [module.training for module in loaded.clip.modules()] == before
    assert len(set(before)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_protocol_and_data_name_every_choice(world: Any, load: Load) -> None:
    """The same model at another size or prompt is another protocol; other data another hash."""
    measured = evaluator(world)(load())
    assert measured.protocol["image_size"] == 224
    assert measured.protocol["grid"] == 14
    assert measured.protocol["classes"] == 17
    assert measured.protocol["source"] == "panoptic"
    things = sum(label < 12 for found in world.rectangles.values() for label, *_ in found)
    expected = {"images": 18, "things": things, "stuff": 18, "skipped": {}}
    assert measured.data["counts"] == expected
    other = evaluator(world, min_area=10000)(load(336, 14))
    assert other.data["hash"] != measured.data["hash"]
    assert other.protocol != measured.protocol
    assert other.data["counts"]["skipped"]["small"] > 0
    json.dumps([dict(measured.protocol), dict(measured.data), dict(measured.details)])


def test_the_evaluator_s_own_size_is_used_and_recorded(world: Any, load: Load) -> None:
    """The literature's 336 and 1024 pixels, whatever the model was made for."""
    measured = evaluator(world, image_size=448)(load(224, 16))
    assert measured.protocol["image_size"] == 448
    assert measured.protocol["grid"] == 28
    assert measured.metrics["boxes/top1"] == 1.0
    with pytest.raises(
        ValueError, match=r"not a multiple of the model's patch size 14; set .* 322"
    ):
        evaluator(world, image_size=330)(load(336, 14))


def test_templates_without_a_place_for_the_name_are_refused(world: Any) -> None:
    with pytest.raises(ValueError, match=r"each needs \{\}"):
        evaluator(world, templates=["a photo"])
    with pytest.raises(ValueError, match="write vild"):
        evaluator(world, templates="imagenet")


def test_a_model_that_gives_nan_is_refused(world: Any, load: Load) -> None:
    with pytest.raises(ValueError, match="not finite"):
        evaluator(world)(load(table=torch.full((17, 17), torch.nan)))


def test_vild_templates_are_the_default(world: Any, load: Load) -> None:
    """63 sentences per class reach the text tower."""
    loaded = load()
    regions = RegionEvaluator(name="regions", data=CocoRegions(**world.panoptic))
    assert set(regions(loaded).metrics.values()) == {1.0}
    assert loaded.clip.text.rows == 63 * 17
    assert regions.protocol["templates"] == "vild"


def test_empty_masks_are_counted(world: Any, load: Load, tmp_path: Path) -> None:
    """A 9 x 9 px region vanishes on the grid without antialias."""
    content = json.loads((world.folder / "panoptic.json").read_text())
    content["annotations"] = content["annotations"][:1]
    content["images"] = content["images"][:1]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    from PIL import Image

    name = content["annotations"][0]["file_name"]
    segments = Image.open(world.folder / "segments" / name)
    segments.paste((1, 2, 3), (0, 0, 9, 9))
    (tmp_path / "segments").mkdir()
    segments.save(tmp_path / "segments" / name)
    tiny = {"id": 1 + 512 + 3 * 65536, "category_id": 1, "bbox": [0, 0, 9, 9]}
    content["annotations"][0]["segments_info"].append(tiny)
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    data = CocoRegions(
        annotations=str(tmp_path / "panoptic.json"),
        images=str(world.folder / "images"),
        segments=str(tmp_path / "segments"),
        mask_antialias=False,
    )
    measured = RegionEvaluator(name="regions", data=data, templates=PROMPT)(load())
    assert measured.details["empty_masks"] == 1
