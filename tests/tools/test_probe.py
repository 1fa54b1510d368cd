"""Linear probes of regions in the shapes world."""

import torch

from gradeclip_ft.models.load import load_clip
from gradeclip_ft.ops.heatmap import pool_boxes
from tools.build_shapes_clip import draw_world
from tools.probe import ALONE, probed, regions


def test_a_probe_reads_what_is_linear_and_nothing_else() -> None:
    """Random features give chance, one of eight; features that hold the answer give all."""
    torch.manual_seed(0)
    shapes = torch.randint(8, (1200,))
    noise = torch.randn(1200, 16)
    signal = torch.cat([noise, torch.eye(8)[shapes]], dim=1)
    asked, right = slice(800, None), shapes[800:]
    assert probed(signal[:800], shapes[:800], signal[asked], right) == 1
    assert probed(noise[:800], shapes[:800], noise[asked], right) < 0.2


def test_the_rows_are_blocks_in_order_paths_and_pictures_of_one_object() -> None:
    """The input of the first block is patches with positions alone: it knows nothing of others."""
    loaded = load_clip("shapes_tiny")
    scenes = draw_world("val", 20, 0, loaded.tokenizer, 64, 1)
    found = regions(loaded.clip, scenes)
    assert list(found)[:4] == [*(f"input of block {n}" for n in (1, 2, 3)), "F_d, value"]
    owners = scenes.owner.tolist()
    assert len(found[ALONE]) == sum(owners.count(row) == 1 for row in range(20)) > 0
    with torch.no_grad():
        opened = loaded.clip.image.open(scenes.pixels(slice(None)))
        dense = opened.trace().dense()
        twice = opened.run(opened.tokens, 0, 2)[:, -64:].view(20, 8, 8, -1)
    for name, grid in (("F_d, value", dense), ("input of block 3", twice)):
        torch.testing.assert_close(found[name], pool_boxes(grid, scenes.boxes, scenes.owner))
