"""A stranger's tokenizer.json is loaded in a child process first: what it does there does not happen here."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.data import tokenizer_file
from research.data.tokenizer import gpt2
from research.exchange.limited_tokenizer import try_tokenizer


def test_a_tokenizer_is_tried_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    gpt2().backend.save(str(path))
    call = f"try_tokenizer({str(path)!r}, Path('.'), 'do this')"
    tried = f"from pathlib import Path; from {try_tokenizer.__module__} import try_tokenizer; {call}"
    subprocess.run([sys.executable, "-c", tried], cwd=ROOT, check=True)  # as a verb does it, whose process has few threads to fork beside
    try_tokenizer("builtin:gpt2", tmp_path, "do this")

    def ends_its_process(name: str, root: Path) -> None:
        signal.raise_signal(signal.SIGTERM)  # this process, if it were run here

    monkeypatch.setattr(tokenizer_file, "load", ends_its_process)
    with pytest.raises(Mistake, match="^the tokenizer .*tokenizer.json ends its process by SIGTERM → do this$"):
        try_tokenizer(str(path), tmp_path, "do this")
