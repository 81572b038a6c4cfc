"""`python -m research data PREFIX` of a store whose index is damaged beyond what is looked at when a store is opened."""

import os
import struct

import numpy as np
import pytest

from research.__main__ import main
from research.data import megatron_index, token_store
from research.data.megatron_index import HEADER
from research.data.tokenizer import BYTES, fixed

DOCUMENTS = 50


@pytest.mark.parametrize("place", [4 * DOCUMENTS + 8 * 40, 12 * DOCUMENTS + 8 * 40])  # a pointer, and a document's first sequence
@pytest.mark.parametrize("value", [-(10**6), 10**15])
def test_a_damaged_index_is_one_sentence(tmp_path, capsys, monkeypatch, place, value):
    monkeypatch.setattr(megatron_index, "AT_OPENING", 20)
    prefix = tmp_path / "store"
    facts = {"tokenizer": BYTES, "tokenizer_sha256": fixed(BYTES).fingerprint}
    token_store.write(prefix, [(np.array([65, 66, 256]), 2)] * DOCUMENTS, 257, facts)
    assert main(["data", str(prefix), "--texts", "3"]) == 0 and "min 3 · median 3 · mean 3.0 · max 3 tokens" in capsys.readouterr().out
    index = tmp_path / "store.idx"
    raw = bytearray(index.read_bytes())
    struct.pack_into("<q", raw, HEADER.size + place, value)
    index.write_bytes(raw)
    os.utime(tmp_path / "store.json")  # so that PREFIX.json is believed
    assert main(["data", str(prefix), "--texts", "3"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error  {index}: the ") and err.count("\n") == 1 and " → copy the .bin and the .idx again" in err
