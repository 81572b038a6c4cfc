"""The order of samples without an index: sample i is found in O(1), by a pseudo-random permutation of [0, n).

A Feistel network permutes [0, 4^k) whatever its round function; what falls outside [0, n) is sent through again until it
falls inside (cycle walking), fewer than four times on average. Nothing is stored: the cursor of a run is one integer.
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
    epoch, place = np.divmod(_counts(i, n), n)
    keys = _mix(_mix(_words(seed)) + epoch.astype(np.uint64))
    return _like(i, _walk(place, n, keys))


@overload
def permute(i: int, n: int, key: int) -> int: ...
@overload
def permute(i: Ints, n: int, key: int) -> Ints: ...
def permute(i, n, key):
    """The image of i under the key's permutation of [0, n)."""
    places = _counts(i, n)
    if np.any(places >= n):
        raise ValueError(f"permute: {int(places.max())} is not in [0, {n})")
    return _like(i, _walk(places, n, np.broadcast_to(_words(key), places.shape)))


def _walk(places: Ints, n: int, keys: Ints) -> Ints:
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits of each half: the smallest 4^half >= n
    found = _feistel(places.astype(np.uint64), half, keys)
    while (outside := found >= n).any():
        found[outside] = _feistel(found[outside], half, keys[outside])
    return found.astype(np.int64)


def _feistel(x: Ints, half: int, keys: Ints) -> Ints:
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
    """Any integer as one 64-bit word. An array, because numpy warns when a *scalar* wraps around."""
    return np.array([value & WORD], np.uint64)


def _counts(i: int | Ints, n: int) -> Ints:
    places = np.atleast_1d(np.asarray(i, np.int64))
    if not 0 < n <= LARGEST or np.any(places < 0):
        raise ValueError(f"no order: i = {i} must not be negative and n = {n} must be in [1, 2^62]")
    return places


def _like(i: int | Ints, found: Ints) -> int | Ints:
    return found if isinstance(i, np.ndarray) and i.ndim else int(found[0])
