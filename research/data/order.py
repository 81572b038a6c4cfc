"""Shuffled order of samples without an index: a pseudo-random permutation of [0, n) that gives sample i in O(1).

A Feistel network permutes [0, 4^k) whatever its round function. A value outside [0, n) is sent through the network again until
it falls inside (cycle walking), fewer than four times on average. Nothing is stored: a run's position is one integer.
"""

from typing import overload

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 8
WORD = (1 << 64) - 1
LARGEST = 1 << 62

Ints = np.ndarray


@overload
def sample(i: int, n: int, seed: int) -> int: ...
@overload
def sample(i: Ints, n: int | Ints, seed: int | Ints) -> Ints: ...
def sample(i, n, seed):
    """Which of n samples is the i-th to be seen. Each epoch (i // n) sees every sample once, in an order of its own.

    With arrays, n and seed may have a value for each i: then each i is a position in the order of its own n and seed.
    """
    positions = np.atleast_1d(np.asarray(i, np.int64))
    sizes = np.asarray(n, np.int64)
    if sizes.min() <= 0 or sizes.max() > LARGEST or np.any(positions < 0):
        raise ValueError(f"no order: i = {i} must not be negative and n = {n} must be in [1, 2^62]")
    epoch, position = np.divmod(positions, sizes)
    keys = mix(mix(words(seed)) + epoch.astype(np.uint64))
    samples = _permute(position, np.broadcast_to(sizes, position.shape), keys)
    return samples if isinstance(i, np.ndarray) and i.ndim else int(samples[0])


def _permute(positions: Ints, sizes: Ints, keys: Ints) -> Ints:
    """The image of each position under its key's permutation of [0, n), by cycle walking."""
    distinct, which = np.unique(sizes, return_inverse=True)
    halves = [max(1, ((n - 1).bit_length() + 1) // 2) for n in distinct.tolist()]  # bits of each half: the smallest 4^half >= n
    half, n = np.array(halves, np.uint64)[which.reshape(sizes.shape)], sizes.astype(np.uint64)
    distinct_keys, key = np.unique(keys, return_inverse=True)
    round_keys, key = mix(distinct_keys + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN), key.reshape(keys.shape)
    images = _feistel(positions.astype(np.uint64), half, round_keys, key)
    outside = np.nonzero(images >= n)
    while len(outside[0]):
        images[outside] = _feistel(images[outside], half[outside], round_keys, key[outside])
        still = images[outside] >= n[outside]
        outside = tuple(indices[still] for indices in outside)
    return images.astype(np.int64)


def _feistel(x: Ints, half: Ints, round_keys: Ints, key: Ints) -> Ints:
    """A keyed permutation of [0, 4^half): each round exchanges the halves of x and mixes one into the other.

    round_keys: 'round key', the keys of each round; key: which of them is that of each element of x.
    """
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for keys in round_keys:
        left, right = right, left ^ (mix(right ^ keys[key]) & mask)
    return (left << half) | right


def mix(x: Ints) -> Ints:
    """Each bit of the result depends on each bit of x: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + GOLDEN  # a copy, which the lines below change
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def words(values: int | Ints) -> Ints:
    """Integers as 64-bit words. The result is an array because numpy warns when a *scalar* wraps around."""
    if isinstance(values, np.ndarray):
        return values.astype(np.uint64)
    return np.array([values & WORD], np.uint64)
