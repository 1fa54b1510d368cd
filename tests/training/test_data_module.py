"""One pass over many epochs, from any place."""

import pytest

from gradeclip_ft.training.data_module import RunLoader


class Epochs:
    """Epochs of four batches, which are their own places."""

    def __init__(self, length: int = 4, given: int | None = None) -> None:
        self.length, self.given = length, length if given is None else given

    def open(self, epoch: int, start: int, begun: int) -> "Epochs":
        opened = Epochs(self.length, self.given)
        opened.place = (epoch, start) if not begun else (epoch, start, begun)
        return opened

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        epoch, start, *begun = self.place
        return ((epoch, number, *begun) for number in range(start, self.given))


def take(loader: RunLoader, count: int) -> list:
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def loader(epochs: Epochs, position: int = 0, **identity: int) -> RunLoader:
    return RunLoader(
        epochs.open, total=10, position=lambda: position, identity={"seed": 0, **identity}
    )


@pytest.mark.parametrize("position", range(10))
def test_from_any_position_the_same_batches_follow(position) -> None:
    whole = [divmod(number, 4) for number in range(10)]
    assert take(loader(Epochs(), position), 10 - position) == whole[position:]


def test_the_length_is_that_of_the_run() -> None:
    """B1: without a length Lightning fetches ahead, and an endless epoch has no schedule."""
    assert len(loader(Epochs(), 3)) == 10


def test_an_epoch_that_ends_too_early_is_an_error() -> None:
    """Else the position would point to other batches after a resume, or the loop never end."""
    with pytest.raises(RuntimeError, match="epoch 0 gave 3 batches from batch 0 on, expected 4"):
        take(loader(Epochs(given=3)), 8)
    with pytest.raises(RuntimeError, match="gave 0 batches"):
        take(loader(Epochs(given=0)), 1)


def test_another_number_of_processes_is_refused_on_resume_with_the_reason() -> None:
    state = loader(Epochs(), world_size=2).state_dict()
    words = r"world_size was 2, is 1: data.resampled=false gives every process its own share"
    with pytest.raises(ValueError, match=words):
        loader(Epochs(), world_size=1).load_state_dict(state)
    loader(Epochs(), world_size=2).load_state_dict(state)


def drawing(length: int, position: int, world_size: int) -> RunLoader:
    return RunLoader(
        Epochs(length).open,
        total=100,
        position=lambda: position,
        identity={"seed": 0, "world_size": world_size},
        resampled=True,
    )


def test_drawn_samples_go_on_with_other_processes_and_new_draws(caplog) -> None:
    """Would catch draws that repeat: epoch 0 of one process holds what epochs 0 and 1 of two do.

    Also a second interruption that falls back to the first draws.
    """
    other = drawing(8, position=6, world_size=1)
    other.load_state_dict(drawing(4, position=6, world_size=2).state_dict())
    assert take(other, 9) == [*((0, number, 6) for number in range(8)), (1, 0, 6)]
    assert "world_size was 2, is 1" in caplog.text
    again = drawing(8, position=9, world_size=1)
    again.load_state_dict(other.state_dict())
    assert take(again, 2) == [(0, 3, 6), (0, 4, 6)]


def test_drawn_samples_do_not_excuse_another_seed() -> None:
    state = drawing(4, 6, 2).state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 0"):
        drawing(4, 6, 2).load_state_dict({**state, "seed": 1})


def test_data_are_prepared_once_and_reported(small_run) -> None:
    run = small_run()
    facts: list[dict] = []
    run.train(max_steps=3, on_prepared=facts.append)
    assert run.source.prepared == 1
    assert facts == [{"tagger": "none"}]
