"""Seeds: 64 bits hashed from a seed and a name, for initialisation, dropout and sampling. Imports no torch."""

import hashlib


def seed_of(seed: int, name: str) -> int:
    """A signed 64-bit number that depends on (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
