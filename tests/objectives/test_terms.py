"""Further losses of an objective, each against a slow version that shares no code with it."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.towers.select import image_tower
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.base import Composed, Term
from gradeclip_ft.objectives.crops import Crops, cut, draw_cells
from gradeclip_ft.objectives.keep import Gram, Keep
from gradeclip_ft.objectives.mosaic import Mosaic, tile
from gradeclip_ft.objectives.step import Step
from tests.tiny import make_tiny_clip, timm_vit


def loss_of(term: Term, clip: Clip, batch: CaptionBatch) -> torch.Tensor:
    """The term after the model has left its start."""
    objective = Composed(terms={"term": term})
    objective.begin(clip)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(0)
    return term(Step(clip, batch, objective.teachers))


@pytest.fixture
def batch(tiny_batch: CaptionBatch) -> CaptionBatch:
    """Six images on a 4 x 4 grid, one caption each."""
    draw = torch.Generator().manual_seed(4)
    captions = torch.randint(1, 48, (6, 16), generator=draw)
    captions[:, -1] = 49
    images = torch.randn(6, 3, 32, 32, generator=draw)
    return dataclasses.replace(tiny_batch, images=images, captions=captions, packed=None)


@pytest.fixture
def start(tiny_vit: Clip) -> Clip:
    """A second model with the weights that `tiny_vit` has at the start."""
    other = make_tiny_clip("vit")
    other.load_state_dict(tiny_vit.state_dict())
    return other


def test_keep_is_the_distance_of_embeddings(
    tiny_vit: Clip, start: Clip, batch: CaptionBatch
) -> None:
    loss = loss_of(Keep(text=0.5), tiny_vit, batch)
    pairs = [
        (tiny_vit.model.encode_image(batch.images), start.model.encode_image(batch.images)),
        (tiny_vit.text.encode(batch.captions), start.text.encode(batch.captions)),
    ]
    image, text = (1 - sum(cosine_similarity(*pair)) / 6 for pair in pairs)
    torch.testing.assert_close(loss, image + 0.5 * text)


def test_gram_compares_every_pair_of_patches(
    tiny_vit: Clip, start: Clip, batch: CaptionBatch
) -> None:
    loss = loss_of(Gram(), tiny_vit, batch)
    tables = []
    for clip in (tiny_vit, start):
        rows = clip.image.trace(batch.images).dense().flatten(1, 2)
        tables.append(cosine_similarity(rows.unsqueeze(1), rows.unsqueeze(2), dim=-1))
    torch.testing.assert_close(loss, (tables[0] - tables[1]).pow(2).mean(), rtol=1e-4, atol=1e-7)


def test_crops_equal_a_loop_over_cells(tiny_vit: Clip, start: Clip, batch: CaptionBatch) -> None:
    """A 2 x 2 grid on 4 x 4 patches: a cell is the mean of four unit tokens."""
    loss = loss_of(Crops(grids=(2,)), tiny_vit, batch)
    dense = torch.nn.functional.normalize(tiny_vit.image.trace(batch.images).dense(), dim=-1)
    distances = []
    for image in range(6):
        for row in range(2):
            for column in range(2):
                y, x = slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16)
                crop = torch.nn.functional.interpolate(
                    batch.images[image : image + 1, :, y, x], size=32, mode="bilinear"
                )
                cell = dense[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                wanted = start.model.encode_image(crop)[0]
                distances.append(1 - cosine_similarity(cell.mean((0, 1)), wanted, dim=0))
    # at an inner edge RoIAlign reads half a pixel of the neighbour
    torch.testing.assert_close(loss, torch.stack(distances).mean(), rtol=0.02, atol=0)


def test_cells_are_drawn_without_repetition() -> None:
    torch.manual_seed(0)
    sides = set()
    for _ in range(20):
        boxes, owner = draw_cells(3, (2, 3), 4)
        assert len(boxes) == 12
        assert owner.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        for image in range(3):
            assert len({tuple(box) for box in boxes[owner == image].tolist()}) == 4
        sides.add(round(1 / float(boxes[0, 2] - boxes[0, 0])))
    assert sides == {2, 3}


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    image = torch.randn(2, 3, 8, 8)
    box, owner = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1])
    torch.testing.assert_close(cut(image, box, owner, 8), image[1:])


def test_a_mosaic_has_every_image_once_at_its_place() -> None:
    """Constant images, 3 x 3 on 32 pixels: sides of 11, 10 and 11."""
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 32, 32)
    order = torch.randperm(10)
    canvases, boxes, owner = tile(images, order, 3)
    assert canvases.shape == (2, 3, 32, 32)
    expected = [*order.tolist(), *order[:8].tolist()]
    for number, box, canvas in zip(expected, boxes, owner, strict=True):
        left, top, right, bottom = (32 * box).round().int().tolist()
        assert right - left in (10, 11)
        place = canvases[canvas, :, top:bottom, left:right]
        torch.testing.assert_close(place, torch.full_like(place, number))


@pytest.mark.parametrize("target", ["image", "start"])
def test_mosaics_equal_a_loop_over_cells(
    target: str, tiny_vit: Clip, start: Clip, batch: CaptionBatch
) -> None:
    loss = loss_of(Mosaic(grids=(2,), target=target), tiny_vit, batch)
    teacher = tiny_vit if target == "image" else start
    torch.testing.assert_close(loss, distances_of(tiny_vit, teacher, batch)[0].mean())
    loss.backward()
    assert tiny_vit.model.visual.proj.grad.abs().sum() > 0


def distances_of(
    clip: Clip, teacher: Clip, batch: CaptionBatch
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Of each cell of 2 x 2 mosaics and its image; the cells; the order of the images."""
    torch.manual_seed(0)
    torch.randint(1, ())
    order = torch.randperm(6).tolist()
    cells = []
    for four in (order[:4], [*order[4:], *order[:2]]):
        small = [
            torch.nn.functional.interpolate(
                batch.images[i : i + 1], size=16, mode="bilinear", antialias=True
            )
            for i in four
        ]
        rows = [torch.cat(small[:2], dim=3), torch.cat(small[2:], dim=3)]
        dense = clip.image.trace(torch.cat(rows, dim=2)).dense()[0]
        dense = torch.nn.functional.normalize(dense, dim=-1)
        cells += [dense[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 2) for x in (0, 2)]
    found = torch.stack(cells[:6])
    wanted = teacher.model.encode_image(batch.images)[order].detach()
    return 1 - cosine_similarity(found, wanted), found, order


def test_clim_contrasts_cells_and_images_with_captions(tiny_vit: Clip, batch: CaptionBatch) -> None:
    """A row's candidates are its own caption and those of the other images, each twice."""
    loss = loss_of(Mosaic(grids=(2,), target="caption"), tiny_vit, batch)
    _, cells, order = distances_of(tiny_vit, tiny_vit, batch)
    normal = torch.nn.functional.normalize
    rows = normal(torch.cat([cells, tiny_vit.model.encode_image(batch.images)]), dim=1)
    image = [*order, *range(6)]
    texts = normal(tiny_vit.text.encode(batch.captions), dim=1)[image]
    logits = tiny_vit.log_scale.exp() * rows @ texts.T
    total = torch.zeros(())
    for table in (logits, logits.T):
        for row in range(12):
            kept = [c for c in range(12) if c == row or image[c] != image[row]]
            answer = torch.tensor([kept.index(row)])
            total = total + cross_entropy(table[row, kept].unsqueeze(0), answer) / 24
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)


def test_terms_add_up_with_their_weights(tiny_vit: Clip, batch: CaptionBatch) -> None:
    objective = Composed(global_weight=0.5, terms={"keep": Keep(weight=3.0), "gram": Gram(2.0)})
    objective.begin(tiny_vit)
    with torch.no_grad():
        tiny_vit.model.visual.proj.mul_(torch.rand(16))
    terms = objective(tiny_vit, batch)
    parts = terms.parts
    expected = 0.5 * parts["global"] + 3 * parts["keep"] + 2 * parts["gram"]
    torch.testing.assert_close(terms.total, expected)


def test_terms_refuse_a_tower_without_dense_features() -> None:
    clip = make_tiny_clip("vit")
    clip.image = image_tower(timm_vit(class_token=False, global_pool="avg"))
    with pytest.raises(UnsupportedTowerError, match="no dense features, so no keep"):
        Composed(terms={"keep": Keep()}).check(clip)
    Composed().check(clip)
