"""References to checkpoints and token stores: their checksums are those of the files on disk, or of what the tokens were made from.

That the real W&B client takes them, offline, is tested with the other records (test_tracker.py, test_track.py, training/test_loop.py).
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.manifest import File, Logical, Manifest, Piece
from research.data import token_store
from research.tracking import run_folder, wandb_artifacts
from research.tracking.run_folder import RunFolder

FILE = "weights-rank00000-000.safetensors"


def checkpoint(folder: RunFolder, step: int) -> Path:
    """A complete checkpoint as far as its manifest goes, with one file."""
    place = folder.checkpoints / f"step_{step:06d}"
    place.mkdir(parents=True)
    content = bytes(range(64)) * step
    (place / FILE).write_bytes(content)
    files = {FILE: File(len(content), hashlib.sha256(content).hexdigest())}
    weight = Logical((16,), "float32", (Piece(FILE, "w", 0, 0, 16),))
    (place / MANIFEST).write_text(Manifest({"step": step, "tokens": 100 * step, "code": "c"}, files, {"weights": {"w": weight}}).text())
    return place


def test_a_checkpoint_is_a_version_with_the_checksums_of_its_files(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a run; with odd signs")
    place = checkpoint(folder, 6)
    found = wandb_artifacts.of_checkpoint(folder, place)
    assert (found.name, found.kind, found.alias) == (f"a-run--with-odd-signs-{folder.id}-checkpoints", "model", "step_000006")
    assert set(found.files) == {MANIFEST, FILE} and found.metadata == {"step": 6, "tokens": 600}
    for name, file in found.files.items():
        content = (place / name).read_bytes()
        assert (file.path, file.size, file.sha256) == (place / name, len(content), hashlib.sha256(content).hexdigest())


def test_a_damaged_or_missing_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a")
    place = checkpoint(folder, 6)
    (place / MANIFEST).write_text((place / MANIFEST).read_text().replace('"tokens": 600', '"tokens": 601'))
    with pytest.raises(ValueError, match="damaged"):
        wandb_artifacts.of_checkpoint(folder, place)
    with pytest.raises(OSError):
        wandb_artifacts.of_checkpoint(folder, folder.checkpoints / "step_000007")


def test_only_complete_checkpoints_that_are_kept_are_referred_to(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "a")
    made = [checkpoint(folder, step) for step in (3, 6, 8)]
    (folder.checkpoints / "step_000009").mkdir()
    assert wandb_artifacts.checkpoints(folder) == made
    assert wandb_artifacts.checkpoints(folder, every=3) == made[:2] and wandb_artifacts.checkpoints(folder, every=0) == []


def test_stores_have_one_checksum_if_and_only_if_text_and_tokenizer_are_the_same(tmp_path: Path) -> None:
    def store(name: str, **facts: str) -> wandb_artifacts.References:
        told = {"source": "a.txt", "source_sha256": "s", "tokenizer": "bpe", "tokenizer_sha256": "t"} | facts
        token_store.write(tmp_path / name, [(np.arange(5), 9)], 100, told)
        return wandb_artifacts.of_store(tmp_path / name, token_store.TokenStore(tmp_path / name).facts)

    first, again = store("one"), store("two", source="b.txt")
    others = [
        store("three", source_sha256="other"),
        store("four", tokenizer_sha256="other"),
        store("five", source_sha256="", tokenizer_sha256="st"),
    ]
    checksums = [{file.sha256 for file in found.files.values()} for found in (first, again, *others)]
    assert checksums[0] == checksums[1] and len(set.union(*checksums)) == 4
    assert (first.name, first.kind, first.alias) == ("one", "dataset", None) and first.metadata["tokens"] == 5
    assert {name: (file.path, file.size) for name, file in first.files.items()} == {
        f"tokens{suffix}": (path, path.stat().st_size) for suffix in (".bin", ".idx", ".json") if (path := tmp_path / f"one{suffix}")
    }


def test_a_name_that_w_b_takes(tmp_path: Path) -> None:
    assert wandb_artifacts.artifact_name("a/b:c é-d_e.f") == "a-b-c---d_e.f" and len(wandb_artifacts.artifact_name("x" * 500)) == 128
