"""The token store of a text: named by the settings, or made from text once, by whichever process comes first, and kept in data.cache."""

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import Mistake
from parallel.files import locked, megabytes, user_path
from research.data import documents, pair_inputs, stores, token_store
from research.data.documents import Spec, label
from research.data.pair_text import Pair
from research.data.records import LONG, Advance, Cache, silent
from research.data.rendered_text import ExampleEncoder
from research.data.special_tokens import SEPARATOR
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

RECIPE = 1
"""Part of every store's name. Raise it whenever the same text would give other tokens."""
GROUP = 1 << 22
"""Characters tokenized at a time: enough for all cores, little enough for any memory."""
AT_ONCE = 4096
"""Pairs tokenized at a time."""


@contextlib.contextmanager
def cache_folder(name: str, root: Path) -> Iterator[Path]:
    """The folder data.cache, created if it is missing. An error of the file system inside is a Mistake.

    It names the file, if the file does not lie in the folder, and data.cache otherwise.
    """
    folder = user_path(root, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if error.filename else folder
        if not file.is_relative_to(folder) and not folder.is_relative_to(file):
            raise Mistake(f"{file} cannot be read ({error.strerror}) → make it readable, or name another file") from error
        raise Mistake(f"data.cache = {name!r} cannot be used ({error}) → name a folder that you may write to") from error


def opened(spec: Spec, root: Path, tokenizer: Tokenizer, cache: Cache) -> TokenStore:
    """The store that `spec` names, or that of a text, from the cache or made now. One in the cache that is damaged is made again."""
    if stores.is_store(spec):
        return stores.load(spec, root, tokenizer, cache)
    digest = text_digest(spec, root, cache)
    # the file name tells a person which corpus and tokenizer it is; the hash beside them is what counts
    names = (name.removeprefix(documents.BUILTIN) for name in (label(spec), tokenizer.name))
    labels = (re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[-60:] for name in names)
    prefix = cache.folder / f"{'-'.join(labels)}-{joined(digest, tokenizer.fingerprint)[:16]}-v{RECIPE}"
    store = _cached(prefix, spec, cache)
    if store is not None:
        return store
    with locked(Path(f"{prefix}.lock"), functools.partial(cache.waiting, f"tokenizing {label(spec)}")):
        if (store := _cached(prefix, spec, cache)) is None:
            facts = {"source": label(spec), "source_sha256": digest, "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.fingerprint}
            with cache.progress(f"tokenizing {label(spec)}") as advance:
                encoded = _encoded(documents.documents_and_pairs(spec, root), tokenizer, advance)
                token_store.write(prefix, encoded, tokenizer.vocab_size, facts)
    return store or TokenStore(prefix)


def _cached(prefix: Path, spec: Spec, cache: Cache) -> TokenStore | None:
    """The store in the cache, whose largest id is known; None if there is none, it is damaged, or its text was empty."""
    try:
        store = TokenStore(prefix)
        if not store.num_bytes:
            return None
        store.facts |= stores.known(store, cache, f"the tokens of {label(spec)}")
    except Mistake:
        return None
    return store


def text_digest(spec: Spec, root: Path, cache: Cache) -> str:
    """SHA-256 (hex) of a text that is not a split: equal digests mean equal documents. It is read only if it has changed."""
    if stores.is_store(spec):
        return stores.digest(spec, root, cache)
    paths = documents.paths(spec, root)
    size = sum(path.stat().st_size for path in paths)

    def find() -> dict[str, str]:
        with cache.progress(f"hashing {label(spec)} ({megabytes(size)})") if size > LONG else silent(""):
            return {"sha256": documents.digest(spec, root)}

    return str(cache.remembered("text", paths, f"hashing {label(spec)}", find)["sha256"])


def _encoded(found: Iterable[str | Pair], tokenizer: Tokenizer, advance: Advance) -> Iterator[tuple[np.ndarray, int]]:
    """Each document's ids, end-of-text last, and its UTF-8 bytes, with the letters of its separator."""
    for kind, some in itertools.groupby(found, key=type):
        encoded: Any = _encoded_pairs if kind is Pair else _encoded_texts
        yield from encoded(some, tokenizer, advance)


def _encoded_texts(texts: Iterable[str], tokenizer: Tokenizer, advance: Advance) -> Iterator[tuple[np.ndarray, int]]:
    """Works on GROUP characters at a time, however long a text is."""
    ids, num_bytes = [], 0
    for group in _groups(texts, tokenizer):
        encoded = tokenizer.encode_arrays([piece for piece, _ in group])
        for (piece, is_last), piece_ids in zip(group, encoded, strict=True):
            ids.append(piece_ids)
            num_bytes += len(piece.encode("utf-8"))
            if is_last:
                yield np.concatenate([*ids, [tokenizer.end_of_text]]), num_bytes
                ids, num_bytes = [], 0
        advance(sum(len(piece) for piece, _ in group))


def _encoded_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, advance: Advance) -> Iterator[tuple[np.ndarray, int]]:
    """The documents of pairs, as `prepare --pairs` makes them. Works on AT_ONCE pairs at a time."""
    pair_inputs.separator_of(tokenizer)
    encoder, pairs = ExampleEncoder(tokenizer), iter(pairs)
    while group := [pair_inputs.rendered(pair, SEPARATOR) for pair in itertools.islice(pairs, AT_ONCE)]:
        for text, (ids, _) in zip(group, encoder.encode_arrays(group), strict=True):
            yield ids, len(text.text.encode("utf-8"))
        advance(sum(len(text.text) for text in group))


def _groups(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[tuple[str, bool]]]:
    """All texts' pieces in order as (piece, whether it is the last of its text), in lists of about GROUP characters."""
    group, size = [], 0
    for text in texts:
        pieces = list(tokenizer.pieces(text))
        for number, piece in enumerate(pieces, start=1):
            group.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= GROUP:
                yield group
                group, size = [], 0
    yield group


def joined(*digests: str) -> str:
    """SHA-256 (hex) of several digests or names."""
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()
