"""The hash behind dropout, reimplemented with Python's integers."""

import hashlib

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def finalised(x: int) -> int:
    """splitmix64's finaliser on an unsigned number of 64 bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def true_place(name: str, sample: int, position: int, seed: int) -> int:
    """64 bits of (seed, layer, sample, position)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}.dropout".encode(), digest_size=8).digest(), "little")
    return finalised(finalised(key + sample & M64) + position * 0xBF58476D1CE4E5B9 & M64)


def is_dropped(place: int, feature: int, p: float) -> bool:
    """One 32-bit round; the lowest p of 2³² signed numbers are dropped."""
    h = ((place & M32) ^ (finalised(feature) & M32)) * 0x7FEB352D + (place >> 32) & M32
    h ^= h >> 15 | (0xFFFE0000 if h >> 31 else 0)  # the shift copies the sign
    h = h * 0x846CA68B & M32
    return (h - (1 << 32) if h >> 31 else h) < int(p * 2**32) - 2**31
