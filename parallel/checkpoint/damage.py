"""Tells whole checkpoints from damaged ones, without torch.

The manifest's own digest and the presence and size of every file are checked in any case, the files' SHA-256 if asked for: that reads
the whole checkpoint. What cannot be read at all counts as damaged.
"""

import stat
from pathlib import Path

from parallel.checkpoint.manifest import MANIFEST, MAX_BYTES, Manifest, OtherFormat, parse
from parallel.errors import Damaged, Mistake
from parallel.files import sha256_of


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, parsed and checked. Damaged if it is not what was written; a Mistake if it has another format."""
    path = checkpoint / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES))
    except OtherFormat as error:
        raise Mistake(f"{path} is not a manifest that can be read: {error} → use the version that wrote it") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is not the manifest of a checkpoint: {error} → use another checkpoint of the run") from None


def damage_of(checkpoint: Path, hashes: bool = False) -> str:
    """What is damaged in a checkpoint, for the middle of a sentence; '' if it is whole, or has a format that only other versions read."""
    try:
        manifest = read_manifest(checkpoint)
    except Damaged as error:
        return str(error).partition(" → ")[0]
    except Mistake:
        return ""
    for name, file in sorted(manifest.files.items()):
        path = checkpoint / name
        try:
            status = path.stat()
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            if size != file.size:
                return f"{path} has {'no content' if size is None else f'{size} bytes'}, the manifest says {file.size} bytes"
            if hashes and (sha256 := sha256_of(path)) != file.sha256:
                return f"{path} has the SHA-256 {sha256[:12]}…, the manifest says {file.sha256[:12]}…"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return ""
