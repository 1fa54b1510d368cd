"""The formulas behind the table of docs/scale.md."""

from tools.scale import all_reduce, every_phrase, gathered


def test_two_and_four_processes_exchange_what_is_counted_by_hand() -> None:
    """Would catch bytes counted twice, or a process that sends to itself."""
    assert all_reduce(1, 10) == gathered(1, 64, 512, kinds=2) == every_phrase(1, 320, 512) == 0
    assert all_reduce(2, 10) == 40  # half to the other, half back: 2 x 5 numbers
    assert all_reduce(4, 12) == 72  # 6 parts of 3 numbers
    # 64 image and 64 caption rows of 2 KiB of each of 3 others, and their gradients
    assert gathered(4, 64, 512, kinds=2) == 3 * 128 * 2048 * 2
    assert every_phrase(2, 320, 512) == 320 * (2 * 2048 + 8)


def test_the_formula_of_gathers_counts_the_gathers_of_a_step(monkeypatch) -> None:
    """By the rows that the two losses hand to their gathers."""
    import torch

    from gradeclip_ft import losses
    from gradeclip_ft.losses import AlignmentOptions, alignment_loss

    rows: list[int] = []

    def gather(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        rows.append(x.numel() * x.element_size())
        return torch.cat([x, x])

    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "rank", lambda: 0)
    monkeypatch.setattr(losses, "row_counts", lambda count, device: [count, count])
    monkeypatch.setattr(losses, "gather_rows", gather)
    alignment_loss(
        torch.randn(5, 16),
        torch.randn(5, 16),
        identity=torch.arange(5),
        weight=torch.ones(5),
        scale=torch.tensor(1.0),
        options=AlignmentOptions(negatives="all"),
    )
    embeddings, identities = 5 * 16 * 4, 5 * 8
    assert sorted(rows)[1:] == [identities, embeddings]  # the first is one count
    assert every_phrase(2, 5, 16) == 2 * embeddings + identities
