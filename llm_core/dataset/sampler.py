"""Which windows a step reads: a pure function of (seed, epoch, step), without files or state.

Positions count windows in the order they are read: step s of batch size B reads positions s*B to s*B + B - 1, and epoch e
holds the positions e*N to e*N + N - 1 of N windows. Within an epoch a keyed permutation maps positions to windows. Where the
text is a mixture of groups, the positions are first dealt to the groups by their shares; each group has epochs of its own.
The permutation is a Feistel network over the next even power of two with cycle walking (Black and Rogaway 2002): it can be
evaluated at one point and inverted, which a shuffled list of a billion windows cannot.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Shares of a mixture are multiples of 1 / SHARE_UNITS: a position times a share fits 64 bits up to 8 * 10^12 positions.
SHARE_UNITS = 1 << 20

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def _mix(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014) of value + key."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of range(size), keyed by (seed, epoch, group)."""

    def __init__(self, size: int, seed: int, epoch: int, group: int = 0) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        words = np.random.SeedSequence([seed, epoch, group]).generate_state(_ROUNDS, np.uint64)
        self._keys = [int(word) & _MASK64 for word in words]

    def __call__(self, positions: Indices) -> Indices:
        """Windows at `positions` of the epoch, both in range(size)."""
        return self._walk(positions, self._keys, inverse=False)

    def inverse(self, windows: Indices) -> Indices:
        """Positions at which `windows` are read."""
        return self._walk(windows, self._keys[::-1], inverse=True)

    def _walk(self, values: Indices, keys: list[int], inverse: bool) -> Indices:
        """Applies the network until each value is back inside range(size)."""
        result = values.astype(np.uint64)
        pending = np.arange(result.size)
        while pending.size:
            result[pending] = self._network(result[pending], keys, inverse)
            pending = pending[result[pending] >= self.size]
        return result.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64], keys: list[int], inverse: bool) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in keys:
            if inverse:
                left, right = right ^ (_mix(left, key) & self._half_mask), left
            else:
                left, right = right, left ^ (_mix(right, key) & self._half_mask)
        return (left << self._half_bits) | right


class WindowSampler:
    """Which window a run reads at each position.

    sizes: number of windows of each group; windows are numbered through all groups. shares: share of the positions of each group,
    in units of 1 / SHARE_UNITS; default: one group with all positions.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shares: Sequence[int] = (SHARE_UNITS,)) -> None:
        self.sizes, self.seed = list(sizes), seed
        self._offsets = np.cumsum([0, *sizes])
        # Each group takes its share of the positions that earlier groups left: (its share, shares left).
        left = np.cumsum(shares[::-1])[::-1]
        self._takes = [(int(share), int(rest)) for share, rest in zip(shares, left, strict=True)]

    def windows_of_step(self, step: int, batch_size: int) -> Indices:
        """The window numbers of one global batch, in order: shape (batch_size,).

        A batch may cross the end of an epoch, so every window is read exactly once per epoch and none is dropped.
        """
        windows = np.empty(batch_size, dtype=np.int64)
        for group, chosen, ranks in self._deal(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)):
            epochs = ranks // self.sizes[group]
            for epoch in np.unique(epochs):
                here = epochs == epoch
                permutation = Permutation(self.sizes[group], self.seed, int(epoch), group)
                windows[chosen[here]] = self._offsets[group] + permutation(ranks[here] % self.sizes[group])
        return windows

    def windows_read(self, positions: int) -> list[int]:
        """Number of windows of each group that the first `positions` positions read, repetitions included."""
        counts = []
        for take, left in self._takes:
            counts.append(positions * take // left if left else 0)
            positions -= counts[-1]
        return counts

    def first_positions(self, group: int) -> Indices:
        """For each window of a group the first position that reads it."""
        positions = Permutation(self.sizes[group], self.seed, 0, group).inverse(np.arange(self.sizes[group], dtype=np.int64))
        take, left = self._takes[group]
        if not take:
            return np.full(self.sizes[group], np.iinfo(np.int64).max)
        # The inverse of _deal: from the rank within this group back through the positions left by each earlier group.
        positions = -(-(positions + 1) * left // take) - 1
        for take, left in reversed(self._takes[:group]):
            positions = positions * left // (left - take)
        return positions

    def _deal(self, positions: Indices) -> Iterator[tuple[int, Indices, Indices]]:
        """For each group: the indices of its `positions`, and their ranks within the group.

        A group takes position p of those that reach it if floor((p + 1) * take / left) exceeds floor(p * take / left): every
        range of positions then has each group by its share, to within one.
        """
        indices = np.arange(len(positions))
        for group, (take, left) in enumerate(self._takes):
            if not take:
                continue
            ranks = positions * take // left
            taken = (positions + 1) * take // left > ranks
            if taken.any():
                yield group, indices[taken], ranks[taken]
            indices, positions = indices[~taken], (positions - ranks)[~taken]


def rank_micro_batches(windows: Indices, micro_batch_size: int, rank: int, world_size: int) -> Indices:
    """The windows of one rank, shape (accumulation steps, micro_batch_size).

    The batch is dealt to its micro-batches like cards, and the micro-batches to the ranks. Ranks take disjoint strided slices,
    and n ranks with one micro-batch add up the same sums as one rank with n micro-batches.
    """
    micro_batches = windows.reshape(micro_batch_size, -1).T
    return np.ascontiguousarray(micro_batches[rank::world_size])
