"""Checkpoints and token stores as Weights & Biases artifacts that hold references: where the files are, their sizes and checksums.

No file is read or uploaded. A checkpoint's checksums are the SHA-256 of its manifest; those of a token store are the SHA-256 of what it was
made from, since the same text and tokenizer always give the same tokens. W&B takes the artifacts offline, too.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import MANIFEST, step_of, steps
from parallel.checkpoint.manifest import parse
from research.tracking.run_folder import RunFolder

CHECKPOINTS, STORE = "checkpoints", "tokens"
STORE_SUFFIXES = (".bin", ".idx", ".json")
MODEL, DATASET = "model", "dataset"
"""W&B's types of artifacts."""
SHOWN = ("step", "samples", "tokens", "config", "commit", "data")
"""What W&B shows of a checkpoint's facts."""
LONGEST_NAME = 128
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True)
class File:
    """A file that an artifact refers to."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class References:
    """An artifact: its name, W&B's type, the files by their names in it, and what else W&B shows of it."""

    name: str
    kind: str
    files: Mapping[str, File]
    description: str
    alias: str | None = None
    """What W&B calls this version beside its number."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def of_checkpoint(folder: RunFolder, checkpoint: Path) -> References:
    """A checkpoint of the run: a version of the artifact TITLE-checkpoints. Raises OSError or ValueError for one that is not complete."""
    text = (checkpoint / MANIFEST).read_bytes()
    manifest = parse(text)
    files = {name: File(checkpoint / name, file.size, file.sha256) for name, file in manifest.files.items()}
    files[MANIFEST] = File(checkpoint / MANIFEST, len(text), hashlib.sha256(text).hexdigest())
    known = {key: value for key, value in manifest.facts.items() if key in SHOWN}
    description = f"{checkpoint.name} of {folder.title}: references to its files, which stay where they are"
    return References(artifact_name(f"{folder.title}-{CHECKPOINTS}"), MODEL, files, description, checkpoint.name, known)


def of_store(prefix: Path, facts: Mapping[str, Any]) -> References:
    """The token store PREFIX.bin and .idx, of which `facts` are known, and PREFIX.json, if there is one."""
    made_from = hashlib.sha256(f"{facts['source_sha256']}\0{facts['tokenizer_sha256']}".encode()).hexdigest()
    paths = [path for suffix in STORE_SUFFIXES if (path := Path(f"{prefix}{suffix}")).is_file() or suffix != ".json"]
    files = {f"{STORE}{path.suffix}": File(path, path.stat().st_size, made_from) for path in paths}
    description = f"{facts['source']} as tokens of {facts['tokenizer']}; its checksum is that of the text and the tokenizer"
    return References(artifact_name(prefix.name), DATASET, files, description, metadata=facts)


def checkpoints(folder: RunFolder, every: int = 1) -> list[Path]:
    """The run's complete checkpoints whose step is a multiple of `every`; 0: none."""
    return [path for path in steps(folder.checkpoints) if every and step_of(path) % every == 0]


def log(run: Any, references: References) -> bool:
    """Logs the artifact in the W&B run; True. Raises what W&B raises, and ValueError if a file is not there."""
    import wandb

    artifact = wandb.Artifact(references.name, references.kind, description=references.description, metadata=dict(references.metadata))
    for name, file in references.files.items():
        (entry,) = artifact.add_reference(file.path.absolute().as_uri(), name=name, checksum=False)
        entry.digest, entry.size = file.sha256, file.size  # W&B's own would be that of the path
    run.log_artifact(artifact, aliases=[references.alias] if references.alias else None)
    return True


def artifact_name(text: str) -> str:
    """`text` with the characters that W&B takes in the name of an artifact; if it is too long, its end."""
    return NOT_IN_A_NAME.sub("-", text)[-LONGEST_NAME:]
