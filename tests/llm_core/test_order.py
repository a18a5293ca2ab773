"""Which window is read when: a pure function that loses nothing and repeats nothing."""

import numpy as np
import pytest

from llm_core.order import Permutation, rank_micro_batches, windows_of_step


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_reaches_every_window_once_and_has_an_inverse(size: int) -> None:
    order = Permutation(size, seed=3, epoch=5)
    windows = order(np.arange(size))
    assert sorted(windows) == list(range(size))
    assert np.array_equal(order.inverse(windows), np.arange(size))


def test_rule_14_every_window_is_seen_once_per_epoch_in_an_order_of_its_own() -> None:
    batch, windows, seed = 6, 50, 11  # 50 is no multiple of 6: batches cross the end of an epoch
    read = np.concatenate([windows_of_step(step, batch, windows, seed) for step in range(25)])
    epochs = read.reshape(3, windows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(windows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], windows_of_step(0, windows, windows, seed + 1))
    # Pure: a step can be asked for alone, in any order.
    assert np.array_equal(windows_of_step(17, batch, windows, seed), read[17 * batch : 18 * batch])


def test_neighbours_are_far_apart() -> None:
    """The order is shuffled in earnest: neighbouring positions read windows a third of the corpus apart on average."""
    windows = Permutation(100_000, seed=0, epoch=0)(np.arange(100_000))
    assert np.abs(np.diff(windows)).mean() == pytest.approx(100_000 / 3, rel=0.02)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_rule_15_ranks_take_disjoint_slices_of_one_global_batch(world_size: int, micro_batch_size: int) -> None:
    batch = windows_of_step(4, 8, 1000, seed=0)
    shares = [rank_micro_batches(batch, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert {share.shape for share in shares} == {(8 // (micro_batch_size * world_size), micro_batch_size)}
    assert sorted(np.concatenate([share.ravel() for share in shares])) == sorted(batch)


def test_ranks_together_form_the_micro_batches_of_one_rank() -> None:
    batch = np.arange(8)
    alone = rank_micro_batches(batch, 2, 0, 1)
    shared = [rank_micro_batches(batch, 2, rank, 2) for rank in range(2)]
    assert [row.tolist() for row in alone] == [shared[number % 2][number // 2].tolist() for number in range(4)]


def test_a_corpus_of_any_size_costs_no_memory() -> None:
    windows = windows_of_step(10**9, 4, 10**12, seed=0)
    assert len(set(windows.tolist())) == 4
    assert windows.max() < 10**12
