"""Random numbers without a state: each is a function of its key alone, such as (seed, epoch, number of a sample)."""

import numpy as np

from research.data.order import GOLDEN, mix, words


def random_words(seed: int, *keys: np.ndarray, count: int) -> np.ndarray:
    """'b count' uint64: `count` random words for each row of `keys`, which are integers of shape 'b'."""
    state = mix(words(seed))
    for key in keys:
        state = mix(state ^ mix(words(np.asarray(key))))
    return mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def random_keys(seed: int, *keys: np.ndarray, count: int) -> np.ndarray:
    """'b count' uint32, two from each random word: enough to draw an order from, in which two are equal by a chance of one in 2^32."""
    return random_words(seed, *keys, count=(count + 1) // 2).view(np.uint32)[:, :count]


def uniform(drawn: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): the upper 53 bits of random words."""
    return (drawn >> np.uint64(11)) * 2.0**-53


def smallest(drawn: np.ndarray, count: int) -> np.ndarray:
    """'b count': the places of the `count` smallest of each row of 'b n' random numbers, in ascending order: each choice is as likely."""
    if not count:
        return np.zeros((len(drawn), 0), np.int64)
    return np.sort(np.argpartition(drawn, count - 1, axis=1)[:, :count], axis=1)
