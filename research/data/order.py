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
def sample(i: Ints, n: int, seed: int) -> Ints: ...
def sample(i, n, seed):
    """Which of n samples is the i-th to be seen. Each epoch (i // n) sees every sample once, in an order of its own."""
    positions = np.atleast_1d(np.asarray(i, np.int64))
    if not 0 < n <= LARGEST or np.any(positions < 0):
        raise ValueError(f"no order: i = {i} must not be negative and n = {n} must be in [1, 2^62]")
    epoch, position = np.divmod(positions, n)
    keys = _mix(_mix(_words(seed)) + epoch.astype(np.uint64))
    samples = _permute(position, n, keys)
    return samples if isinstance(i, np.ndarray) and i.ndim else int(samples[0])


def _permute(positions: Ints, n: int, keys: Ints) -> Ints:
    """The image of each position under its key's permutation of [0, n), by cycle walking."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits of each half: the smallest 4^half >= n
    images = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := images >= n).any():
        images[outside] = _feistel(images[outside], half, keys[outside])
    return images.astype(np.int64)


def _feistel(x: Ints, half: int, keys: Ints) -> Ints:
    """A keyed permutation of [0, 4^half): each round exchanges the halves of x and mixes one into the other."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for turn in range(1, ROUNDS + 1):
        turn_keys = _mix(keys + _words(turn) * GOLDEN)
        left, right = right, left ^ (_mix(right ^ turn_keys) & mask)
    return (left << bits) | right


def _mix(x: Ints) -> Ints:
    """Each bit of the result depends on each bit of x: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(value: int) -> Ints:
    """Any integer as one 64-bit word. The result is an array because numpy warns when a *scalar* wraps around."""
    return np.array([value & WORD], np.uint64)
