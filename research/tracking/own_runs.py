"""Tells the runs that this checkout has made from those that came from elsewhere, by a keyed hash that each keeps: RUN/made_here.

The key lies in the checkout, readable by its owner only, so nobody else can make a run folder pass for one of these; it is not part of
the cache, which is safe to delete. The hash covers config.json and variant.py: what names other files, and what is executed. A run that
was copied here, was made by an older version, or whose key was deleted, counts as somebody else's until its user trusts it: what reads
it then reads and executes less (research/generation/trust.py).
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from parallel.files import published
from parallel.regular_files import read_regular
from research import ROOT
from research.tracking.run_folder import RunFolder

KEY, KEY_BYTES = ROOT / ".own_runs.key", 32
MARK, LARGEST = "made_here", 2**20


def mark_as_own(folder: RunFolder, key_file: Path = KEY) -> bool:
    """Writes the hash of a run that this checkout makes, after its config.json and source/, or that its user trusts.

    Returns whether it could be written: a checkout or a run on a read-only disk keeps no key or no mark. A link in the mark's place is
    replaced, not followed.
    """
    try:
        _make_key(key_file)
        with published(folder.path / MARK) as temporary:
            temporary.write_text(_hash(folder, key_file))
    except (OSError, ValueError):
        return False
    return True


def is_own(folder: RunFolder, key_file: Path = KEY) -> bool:
    """Whether this checkout has made the run, with this config.json and this variant.py."""
    try:
        kept = read_regular(folder.path / MARK, 1000).decode("ascii")
        return hmac.compare_digest(kept, _hash(folder, key_file))
    except (OSError, ValueError):
        return False


def _make_key(path: Path) -> None:
    """Creates the key if there is none, whole or not at all, so that two runs that begin at once have the same one."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
    try:
        os.link(temporary, path)  # fails if another process was first
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _hash(folder: RunFolder, key_file: Path) -> str:
    key = read_regular(key_file, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise ValueError("it is no key")
    variant = folder.source / "variant.py"
    parts = [read_regular(folder.config, LARGEST), read_regular(variant, LARGEST) if variant.exists() else b""]
    return hmac.new(key, b"".join(hashlib.sha256(part).digest() for part in parts), hashlib.sha256).hexdigest()
