"""Which windows a step reads: a pure function of (seed, epoch, step), with no file and no memory.

Positions count windows in the order they are read: step s of batch size B reads positions s*B to s*B + B - 1, and epoch e
holds the positions e*N to e*N + N - 1 of N windows. Inside an epoch a keyed permutation says which window stands where.
The permutation is a Feistel network over the next even power of two with cycle walking (Black and Rogaway 2002): it can be
evaluated at one point and inverted, which a shuffled list of a billion windows cannot.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def _mix(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014) of value + key."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of range(size), keyed by (seed, epoch)."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        words = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
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


def windows_of_step(step: int, batch_size: int, num_windows: int, seed: int) -> Indices:
    """The window numbers of one global batch, in order: shape (batch_size,).

    A batch may cross the end of an epoch, so every window is read exactly once per epoch and none is dropped.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    windows = np.empty_like(positions)
    epochs = positions // num_windows
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        windows[here] = Permutation(num_windows, seed, epoch)(positions[here] % num_windows)
    return windows


def rank_micro_batches(windows: Indices, micro_batch_size: int, rank: int, world_size: int) -> Indices:
    """The share of one rank, shape (accumulation steps, micro_batch_size).

    The batch is dealt to its micro-batches like cards and the micro-batches to the ranks likewise. So the ranks take disjoint
    strided slices, and n ranks with one micro-batch add up the very sums that one rank with n micro-batches does.
    """
    micro_batches = windows.reshape(micro_batch_size, -1).T
    return np.ascontiguousarray(micro_batches[rank::world_size])
