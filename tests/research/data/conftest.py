"""Small corpora that the tests of research/data share."""

import json
import os
import types

import numpy as np
import pytest

from research.data.token_store import TokenStore, write


def settle(*paths):
    """Sets the modification times a minute back: what was found in a file that has just changed is not believed at the next start."""
    for path in paths:
        changed = path.stat().st_mtime_ns - 60 * 10**9
        os.utime(path, ns=(changed, changed))


@pytest.fixture
def lines(tmp_path):
    """write(name, texts): a .jsonl file with these texts in the test's own folder, as old as a file at rest; returns its name."""

    def write(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        settle(tmp_path / name)
        return name

    return write


@pytest.fixture
def settings(lines):
    """Data settings of a tiny corpus: 20 documents to train on, 3 to validate."""
    train = lines("train.jsonl", [f"document {i}: the cat sat on mat {i * i}" for i in range(20)])
    validation = lines("val.jsonl", ["the dog sat", "élan — 猫", "the end"])
    return types.SimpleNamespace(train=train, validation=validation, tokenizer="builtin:bpe-300", cache="cache")


@pytest.fixture
def token_store(tmp_path):
    """make(num_tokens): a store whose token k is k, so that a token tells its position; documents of 7 tokens."""

    def make(num_tokens: int, name: str = "stream") -> TokenStore:
        ids = np.split(np.arange(num_tokens), range(7, num_tokens, 7))
        write(tmp_path / name, ((part, 3) for part in ids), 70000, {})
        return TokenStore(tmp_path / name)

    return make
