"""Stores of ours are read by Megatron-LM's own reader, and stores that its own builder writes are read here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.data.token_store import TokenStore, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (requirements-dev.txt)"),
]
READ = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset

for name in sys.argv[1:]:
    for mmap in (True, False):
        dataset = IndexedDataset(name, mmap=mmap)
        ids = [sequence.tolist() for sequence in dataset]
        print(json.dumps({"documents": dataset.document_indices.tolist(), "type": dataset[0].dtype.name, "ids": ids}))
"""
BUILD = """
import json, sys
import numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

documents = json.load(open(sys.argv[1]))
for kind in ("uint8", "int8", "int16", "int32", "int64", "uint16"):
    for modes in (False, True):
        builder = IndexedDatasetBuilder(f"{kind}-{modes}.bin", dtype=getattr(np, kind), multimodal=modes)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence), *([1] if modes else []))
            builder.end_document()
        builder.finalize(f"{kind}-{modes}.idx")
"""


def megatron(folder: Path, program: str, *arguments: str) -> str:
    """The output of a program that imports Megatron, in a process of its own: it changes torch when it is imported."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_megatron_s_own_reader_reads_ours(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    expected = []
    for name, size, kind in (("small", 300, "uint16"), ("large", 70_000, "int32")):
        documents = [chance.integers(0, size, length) for length in chance.integers(1, 50, 100)]
        write(tmp_path / name, ((ids, 1) for ids in documents), size, {})
        expected += [{"documents": list(range(101)), "type": kind, "ids": [ids.tolist() for ids in documents]}] * 2
    assert [json.loads(line) for line in megatron(tmp_path, READ, "small", "large").splitlines()] == expected


def test_what_megatron_s_own_builder_writes_is_read_here(tmp_path: Path) -> None:
    """Documents of one to four sequences, of every type of whole numbers, with and without the trailing array of modes."""
    chance = np.random.default_rng(1)
    documents = [
        [chance.integers(0, 100, length).tolist() for length in chance.integers(1, 9, count)] for count in chance.integers(1, 5, 20)
    ]
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    megatron(tmp_path, BUILD, "documents.json")
    joined = [sum(sequences, []) for sequences in documents]
    for kind in ("uint8", "int8", "int16", "int32", "int64", "uint16"):
        for modes in (False, True):
            store = TokenStore(tmp_path / f"{kind}-{modes}")
            assert [store.tokens[begin:end].tolist() for begin, end in store.documents()] == joined, (kind, modes)
