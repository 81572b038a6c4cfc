"""Token stores that a run names by `store:PREFIX`: of Megatron-LM, Megatron-DeepSpeed, GPT-NeoX or Tessera, used as they are.

What a store's files do not say is found by reading them once, and kept in data.cache, never beside files of other programs.
"""

import hashlib
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from parallel.errors import Mistake
from parallel.files import megabytes, user_path
from research.data.documents import Spec
from research.data.megatron_index import file_of
from research.data.records import LONG, Cache, silent
from research.data.token_store import TokenStore, check_ids
from research.data.tokenizer import Tokenizer, is_made_from_text

STORE = "store:"
FOUND = ("max_id", "bin_sha256", "idx_sha256")
"""What is to be known of a store and only reading all of it tells."""


def is_store(spec: Spec) -> TypeGuard[str]:
    """Whether a text of the settings is a token store."""
    return isinstance(spec, str) and spec.startswith(STORE)


def prefix_of(spec: str, root: Path) -> Path:
    """The PREFIX of 'store:PREFIX'; a relative one starts at `root`."""
    return user_path(root, spec.removeprefix(STORE))


def check(spec: str, root: Path, setting: str) -> None:
    """Opens the store, in milliseconds: a Mistake if it is not there or not whole."""
    try:
        prefix = prefix_of(spec, root)
    except Mistake as mistake:
        raise Mistake(f"{setting} = {spec!r}: {mistake}") from None
    if not file_of(prefix, ".idx").is_file():
        there = sorted(path.name for path in prefix.parent.iterdir()) if prefix.parent.is_dir() else []
        near = [name for name in there if name.startswith(prefix.stem) and name.endswith(".idx")]
        folder = spec.removesuffix(prefix.name)
        meant = f"is {folder}{near[0].removesuffix('.idx')} meant?" if near else "name what stands before .bin and .idx of the two files"
        raise Mistake(f"{setting} = {spec!r}: {file_of(prefix, '.idx')} does not exist → {meant}")
    try:
        TokenStore(prefix)
    except Mistake as mistake:
        raise Mistake(f"{setting} = {spec!r}: {mistake}") from None


def check_tokenizer(train: Spec, tokenizer: str) -> None:
    """Refuses a tokenizer that would have to be trained on the text of a store."""
    if is_store(train) and is_made_from_text(tokenizer):
        raise Mistake(
            f"data.tokenizer = {tokenizer!r} is trained on a text, and data.train = {train!r} has only tokens → name the tokenizer that "
            "the store was made with: builtin:gpt2 or a tokenizer.json"
        )


def digest(spec: str, root: Path, cache: Cache) -> str:
    """SHA-256 (hex) of the store: equal digests mean equal tokens in equal documents."""
    return _digest(*_opened(spec, root, cache))


def load(spec: str, root: Path, tokenizer: Tokenizer, cache: Cache) -> TokenStore:
    """The store, with `facts` as if it had been tokenized here. A Mistake if it was made with another tokenizer."""
    store, found = _opened(spec, root, cache)
    made_with = store.facts.get("tokenizer_sha256", tokenizer.fingerprint)
    if made_with != tokenizer.fingerprint:
        beside = prefix_of(spec, root).with_name("tokenizer.json")  # where `prepare` puts it
        named = f": {beside}" if beside.is_file() else ""
        raise Mistake(
            f"{spec!r} was made with the tokenizer {store.facts.get('tokenizer')!r} (SHA-256 {made_with[:16]}), data.tokenizer = "
            f"{tokenizer.name!r} is another (SHA-256 {tokenizer.fingerprint[:16]}) → name the one that it was made with{named}"
        )
    if found["max_id"] >= tokenizer.vocab_size:
        way_out = "name the tokenizer that the store was made with"
        check_ids(store, tokenizer.vocab_size, f"the tokens of data.tokenizer ({tokenizer.name})", way_out)
    store.facts = {
        **{"documents": store.num_documents, "tokens": store.num_tokens},
        **(store.facts | found),
        **{"source": spec, "source_sha256": _digest(store, found)},
        **{"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.fingerprint},
    }
    return store


def known(store: TokenStore, cache: Cache, name: str) -> dict[str, Any]:
    """max_id, bin_sha256 and idx_sha256 of a store: as its PREFIX.json says, if that is no older than the other files, else by reading.

    A Mistake if the files are not those that PREFIX.json tells of, if the index is not in order, or if an id is negative.
    """
    files = [file_of(store.prefix, suffix) for suffix in (".bin", ".idx")]
    sidecar, claimed = file_of(store.prefix, ".json"), {key: store.facts[key] for key in FOUND if key in store.facts}
    tells_all = len(claimed) == len(FOUND) and sidecar.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in files)
    if tells_all and not cache.believe_since_ns:
        return claimed
    size = files[0].stat().st_size

    def find() -> dict[str, Any]:
        with cache.progress(f"reading {name} ({megabytes(size)})") if size > LONG else silent(""):
            found = store.read()
        if found["min_id"] < 0:
            check_ids(store, found["max_id"] + 1)
        return found

    found = cache.remembered("store", files, f"reading {name}", find)
    for key in claimed:
        if claimed[key] != found[key]:
            raise Mistake(
                f"{name}: {sidecar} says {key} {str(claimed[key])[:16]}, the files have {str(found[key])[:16]}: they have changed since "
                "they were written → prepare the store again, or copy it again"
            )
    return {key: found[key] for key in FOUND}


def with_bytes(store: TokenStore, tokenizer: Tokenizer, cache: Cache) -> TokenStore:
    """The same store, which knows the UTF-8 bytes of its text: by decoding it once, if nothing else says."""
    if "bytes" in store.facts:
        return store
    name = store.facts["source"]

    def find() -> dict[str, Any]:
        with cache.progress(f"decoding {name} to count its bytes") as advance:
            total = 0
            for begin, end in store.documents():
                text = tokenizer.decode(without(store.tokens[begin:end], tokenizer.end_of_text))
                total += len(text.encode("utf-8"))
                advance(len(text))
        return {"bytes": total}

    first = store.facts.get("first_document", 0)
    kind = f"bytes-{tokenizer.fingerprint[:16]}-{first}-{first + store.num_documents}"
    if "first_token" in store.facts:
        kind += f"-{store.facts['first_token']}-{store.num_tokens}"
    files = [file_of(store.prefix, suffix) for suffix in (".bin", ".idx")]
    store.facts |= cache.remembered(kind, files, f"decoding {name}", find)
    return store


def without(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The ids that are text."""
    return ids[ids != end_of_text]


def _opened(spec: str, root: Path, cache: Cache) -> tuple[TokenStore, dict[str, Any]]:
    store = TokenStore(prefix_of(spec, root))
    return store, known(store, cache, spec)


def _digest(store: TokenStore, found: dict[str, Any]) -> str:
    words = ("store", store.tokens.dtype.str, found["bin_sha256"], found["idx_sha256"])
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
