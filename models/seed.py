"""Numbers that depend on what they are for, and on nothing else: 64 bits hashed from a seed and a name. No torch."""

import hashlib


def seed_of(seed: int, name: str) -> int:
    """64 bits, signed, that depend on (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
