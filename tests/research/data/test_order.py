"""The order: against sets, counts and an independent Feistel network in plain Python."""

import collections

import numpy as np
import pytest

from research.data import order

WORD = (1 << 64) - 1


def mix(x):
    """splitmix64's next(), in Python's unbounded integers. First outputs for seed 0 are published with the generator."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference(i, n, key):
    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = divmod(i, 2**half)
        for turn in range(1, 9):
            turn_key = mix((key + turn * 0x9E3779B97F4A7C15) & WORD)
            left, right = right, left ^ (mix(right ^ turn_key) % 2**half)
        i = left * 2**half + right
        if i < n:
            return i


def permute(i, n, key):
    """The image of i, a number or an array, under the key's permutation of [0, n)."""
    positions = np.atleast_1d(np.asarray(i, np.int64))
    images = order._permute(positions, np.full_like(positions, n), np.broadcast_to(order.words(key), positions.shape))
    return images if isinstance(i, np.ndarray) else int(images[0])


def test_the_mixer_is_splitmix64():
    assert mix(0) == 0xE220A8397B1DCDAF  # the generator's first output for seed 0
    assert int(order.mix(np.array([0], np.uint64))[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 65536, 65537])
def test_every_sample_once_an_epoch(n):
    for epoch in (0, 1):
        seen = order.sample(np.arange(epoch * n, (epoch + 1) * n), n, seed=1)
        assert sorted(seen.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 100, 12345, 10**12 + 39])
def test_equal_to_plain_python(n):
    places = [k for k in (0, 1, 2, 7, n // 2, n - 1) if k < n]
    for key in (0, 1, WORD):
        assert [permute(k, n, key) for k in places] == [reference(k, n, key) for k in places]
        assert permute(np.array(places), n, key).tolist() == [reference(k, n, key) for k in places]
    epoch_key = (mix(5) + 2) & WORD
    assert order.sample(2 * n + places[-1], n, seed=5) == reference(places[-1], n, mix(epoch_key))


def test_golden_values_never_change():
    """A run resumed with a later version must see the same samples."""
    assert order.sample(np.arange(8), 1000, seed=1234).tolist() == [347, 549, 615, 377, 778, 149, 380, 164]
    assert order.sample(np.arange(1000, 1008), 1000, seed=1234).tolist() == [230, 692, 298, 577, 127, 500, 705, 326]


def test_scalars_arrays_and_shapes_agree():
    i = np.arange(40).reshape(4, 10)
    found = order.sample(i, 17, seed=3)
    assert found.shape == i.shape and found.dtype == np.int64
    assert found.tolist() == [[order.sample(int(k), 17, 3) for k in row] for row in i]
    assert isinstance(order.sample(5, 17, 3), int)


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [order.sample(np.arange(n) + epoch * n, n, seed) for epoch in range(3) for seed in (0, 1, -1, 2**40)]
    for a in range(len(orders)):
        for b in range(a):
            assert (orders[a] == orders[b]).mean() < 0.02  # 1/n by chance


def test_looks_shuffled():
    """Rank correlations with the identity, the neighbour and the next epoch are those of chance: |r| < 4/√n."""
    n = 20011
    first, second = (order.sample(np.arange(n) + epoch * n, n, seed=9) for epoch in (0, 1))
    for a, b in ((np.arange(n), first), (first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)
    assert abs(int((first == np.arange(n)).sum()) - 1) <= 6  # fixed points of a random permutation: 1 ± 1


@pytest.mark.parametrize("n", [2, 3, 4])
def test_small_permutations_are_equally_likely(n):
    """χ² over all n! orders of 2,000 seeds, below the 99.9 % quantile for n! - 1 degrees of freedom."""
    seeds = np.broadcast_to(np.arange(2000, dtype=np.uint64)[:, None], (2000, n))
    orders = order.sample(np.broadcast_to(np.arange(n), seeds.shape), n, seeds)
    assert orders[7].tolist() == order.sample(np.arange(n), n, 7).tolist()
    counts = collections.Counter(map(tuple, orders.tolist()))
    cells = {2: 2, 3: 6, 4: 24}[n]
    expected = 2000 / cells
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values()) + (cells - len(counts)) * expected
    assert chi2 < {2: 10.83, 3: 20.52, 4: 49.73}[n]


@pytest.mark.parametrize(("i", "n"), [(-1, 5), (0, 0), (0, -3)])
def test_nonsense_is_refused(i, n):
    with pytest.raises(ValueError, match="no order"):
        order.sample(i, n, 0)
