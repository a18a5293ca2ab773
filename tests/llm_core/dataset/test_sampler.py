"""Which window is read when: a pure function that skips nothing and repeats nothing."""

import numpy as np
import pytest

from llm_core.dataset import SHARE_UNITS, WindowSampler, rank_micro_batches
from llm_core.dataset.sampler import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_reaches_every_window_once_and_has_an_inverse(size: int) -> None:
    order = Permutation(size, seed=3, epoch=5)
    windows = order(np.arange(size))
    assert sorted(windows) == list(range(size))
    assert np.array_equal(order.inverse(windows), np.arange(size))


def test_rule_14_every_window_is_read_once_per_epoch_in_a_new_order() -> None:
    batch, windows, seed = 6, 50, 11  # 50 is not a multiple of 6: batches cross the end of an epoch
    order = WindowSampler([windows], seed)
    read = np.concatenate([order.windows_of_step(step, batch) for step in range(25)])
    epochs = read.reshape(3, windows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], WindowSampler([windows], seed + 1).windows_of_step(0, windows))
    # Pure: steps can be computed alone and in any order.
    assert np.array_equal(order.windows_of_step(17, batch), read[17 * batch : 18 * batch])


def test_neighboring_positions_read_distant_windows() -> None:
    """Neighboring positions read windows a third of the corpus apart on average."""
    windows = Permutation(100_000, seed=0, epoch=0)(np.arange(100_000))
    assert np.abs(np.diff(windows)).mean() == pytest.approx(100_000 / 3, rel=0.02)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_rule_15_ranks_take_disjoint_slices_of_one_global_batch(world_size: int, micro_batch_size: int) -> None:
    batch = WindowSampler([1000], seed=0).windows_of_step(4, 8)
    shares = [rank_micro_batches(batch, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {share.shape for share in shares} == {(8 // (micro_batch_size * world_size), micro_batch_size)}
    assert sorted(np.concatenate([share.ravel() for share in shares])) == sorted(batch)


def test_ranks_together_form_the_micro_batches_of_one_rank() -> None:
    batch = np.arange(8)
    alone = rank_micro_batches(batch, 2, 0, 1)
    shared = [rank_micro_batches(batch, 2, rank, 2) for rank in range(2)]
    assert [row.tolist() for row in alone] == [shared[number % 2][number // 2].tolist() for number in range(4)]


def test_the_order_of_a_corpus_of_any_size_needs_no_memory() -> None:
    windows = WindowSampler([10**12], seed=0).windows_of_step(10**9, 4)
    assert len(set(windows.tolist())) == 4
    assert windows.max() < 10**12


def shares(*values: float) -> list[int]:
    units = [int(value * SHARE_UNITS) for value in values]
    return [SHARE_UNITS - sum(units[1:]), *units[1:]]


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([50, 30], (0.95, 0.05)), ([7, 20, 40], (0.5, 0.2, 0.3)), ([5, 0, 9], (0.6, 0.0, 0.4))]
)
def test_rule_14_a_mixture_reads_each_group_by_its_share_and_in_its_own_epochs(
    sizes: list[int], wanted: tuple[float, ...]
) -> None:
    order = WindowSampler(sizes, 5, shares(*wanted))
    read = np.concatenate([order.windows_of_step(step, 8) for step in range(100)])
    offsets = np.cumsum([0, *sizes])
    group_of = np.searchsorted(offsets, read, side="right") - 1
    for group, (size, share) in enumerate(zip(sizes, wanted, strict=True)):
        group_windows = read[group_of == group] - offsets[group]
        assert len(group_windows) == order.windows_read(800)[group] == pytest.approx(800 * share, abs=len(sizes))
        # Any range of the run has the group by its share, not only the whole run.
        assert (group_of[100:200] == group).sum() == pytest.approx(100 * share, abs=len(sizes))
        for epoch in range(len(group_windows) // max(1, size)):
            assert sorted(group_windows[epoch * size : (epoch + 1) * size]) == list(range(size))
    # Pure: a step can be computed alone.
    assert np.array_equal(order.windows_of_step(31, 8), read[31 * 8 : 32 * 8])


def test_first_positions_match_the_order_of_a_mixture() -> None:
    sizes = [11, 23, 6]
    order = WindowSampler(sizes, 5, shares(0.5, 0.3, 0.2))
    read = np.concatenate([order.windows_of_step(step, 4) for step in range(100)]).tolist()
    for group, offset in enumerate((0, 11, 34)):
        positions = order.first_positions(group)
        assert positions.tolist() == [read.index(offset + window) for window in range(sizes[group])]
