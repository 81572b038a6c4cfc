"""A stranger's tokenizer.json is loaded in a child process first: what it does there does not happen here."""

import os
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research.data import tokenizer_file
from research.data.tokenizer import gpt2
from research.exchange.limited_tokenizer import try_tokenizer


def test_a_tokenizer_is_tried_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load = tmp_path / "tokenizer.json", tokenizer_file.load
    gpt2().backend.save(str(path))
    try_tokenizer(str(path), tmp_path, "do this")
    try_tokenizer("builtin:gpt2", tmp_path, "do this")
    here = os.getpid()

    def ends_its_process(name: str, root: Path) -> object:  # as a library does that gets no memory
        os._exit(3) if os.getpid() == here else os.abort()
        return load(name, root)

    monkeypatch.setattr(tokenizer_file, "load", ends_its_process)
    with pytest.raises(Mistake, match="^the tokenizer .*tokenizer.json ends its process by SIGABRT: .* → do this$"):
        try_tokenizer(str(path), tmp_path, "do this")
