"""The mask of a supervised token store: which tokens are part of a response, so that their loss counts.

    PREFIX.mask.bin    uint8, one for each token of PREFIX.bin: 1 for a token of a response, else 0
    PREFIX.mask.sums   int64 (little-endian), 'documents + 1': the tokens of responses before each document, and at the end of all

PREFIX.json has the SHA-256 of both and Σ, the tokens of responses in the store.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from parallel.errors import Mistake
from parallel.files import published, sha256_of
from research.data.megatron_index import file_of
from research.data.token_store import WRITTEN_AT_ONCE, TokenStore

MASK, SUMS = ".mask.bin", ".mask.sums"
MASK_SHA256, SUMS_SHA256, MASK_SUM = "mask_sha256", "mask_sums_sha256", "mask_sum"
PREPARE = "prepare the examples again: python -m research prepare FILE.jsonl --as NAME --supervised"


class MaskWriter:
    """Writes the mask of a store beside it, document by document. On leaving, both files appear, each whole, and `facts` tells of them.

    It has to be left before the StoreWriter of the same prefix, whose `facts` it is given: the mask is there before .idx is.
    """

    def __init__(self, prefix: Path, facts: dict[str, Any]) -> None:
        self.prefix, self.facts = prefix, facts
        self.total = 0
        self._sha256 = [hashlib.sha256(), hashlib.sha256()]
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files:
            paths = [files.enter_context(published(file_of(self.prefix, end))) for end in (MASK, SUMS)]
            self._open = [files.enter_context(open(path, "wb", WRITTEN_AT_ONCE)) for path in paths]
            self._write(1, np.zeros(1, "<i8"))
            self._files = files.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)
        if error is None:
            digests = dict(zip((MASK_SHA256, SUMS_SHA256), (sha256.hexdigest() for sha256 in self._sha256), strict=True))
            self.facts.update(digests, **{MASK_SUM: self.total})

    def add_documents(self, mask: np.ndarray, lengths: np.ndarray) -> None:
        """Appends the masks, 0 or 1, of documents that lie one after the other, each of one token at least."""
        self._write(0, mask.astype(np.uint8))
        sums = self.total + np.cumsum(mask, dtype=np.int64)[np.cumsum(lengths) - 1]
        self._write(1, sums.astype("<i8"))
        self.total = int(sums[-1]) if len(sums) else self.total

    def _write(self, which: int, values: np.ndarray) -> None:
        raw = values.tobytes()
        self._open[which].write(raw)
        self._sha256[which].update(raw)


class TokenMask:
    """The mask of a store, or of a part of one. Opening it reads a few pages, unless PREFIX.json is older than the mask."""

    def __init__(self, store: TokenStore) -> None:
        """A Mistake if the store has no mask, or the mask is not that of the store."""
        path, sums_path, sidecar = (file_of(store.prefix, end) for end in (MASK, SUMS, ".json"))
        if not path.is_file() or not sums_path.is_file():
            raise Mistake(f"{store.prefix} has no {MASK} and {SUMS}, so which of its tokens are responses is not known → {PREPARE}")
        facts, index = _facts(sidecar), store.index
        right = path.stat().st_size == index.num_tokens and sums_path.stat().st_size == 8 * (index.num_documents + 1)
        if right and sidecar.stat().st_mtime_ns < max(file.stat().st_mtime_ns for file in (path, sums_path)):
            right = all(sha256_of(file) == facts.get(name) for file, name in ((path, MASK_SHA256), (sums_path, SUMS_SHA256)))
        sums = np.memmap(sums_path, "<i8", mode="r").view(np.ndarray) if right else np.zeros(1, np.int64)
        if not right or sums[0] != 0 or sums[-1] != facts.get(MASK_SUM):
            raise Mistake(f"{path} is not the mask of {store.prefix}: it was not written whole, or changed afterwards → {PREPARE}")
        if "first_token" in store.facts:
            raise Mistake(f"{store.prefix} has a single example, which a split by tokens would cut → hold out another store")
        first = store.facts.get("first_document", 0)
        begin = int(index.document_offsets(first, first)[0] - index.document_offsets(0, 0)[0])
        self.values: np.ndarray = np.memmap(path, np.uint8, mode="r").view(np.ndarray)[begin : begin + store.num_tokens]
        """'tokens' uint8, one for each token of the store: 1 for a token of a response."""
        self.sums: np.ndarray = sums[first : first + store.num_documents + 1]
        """'documents + 1' int64: document k of the store has sums[k + 1] - sums[k] tokens of responses."""


def _facts(sidecar: Path) -> dict[str, Any]:
    try:
        found = json.loads(sidecar.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
