"""Preparing a corpus: tokenizer and token stores, made once by whichever process comes first and cached under data.cache."""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from parallel.errors import Mistake
from parallel.files import locked, megabytes
from research.data import documents, splits, stores, token_store, tokenizer_file
from research.data.records import LONG, Advance, Cache, Progress, silent
from research.data.token_store import TokenStore
from research.data.tokenizer import TRAINED, Tokenizer, declared_vocab_size, fixed, is_made_from_text, kept, pieces, trained

RECIPE = 1
"""Part of every store's name. Raise it whenever the same text would give other tokens."""
GROUP = 1 << 22
"""Characters tokenized at a time: enough for all cores, little enough for any memory."""

TOKENS_PER_CHARACTER = 4
"""The most tokens that one character can have: a byte each."""


class DataSettings(Protocol):
    """The fields of research.config.Data that are read here; research/data/ imports no other room."""

    train: str
    validation: str
    tokenizer: str
    cache: str


class HeldOut(NamedTuple):
    """What a validation predicts: `tokens` tokens of the store, from the second on, and the UTF-8 bytes of the text up to the last."""

    store: TokenStore
    tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Corpus:
    """What a run reads. Two fingerprints are equal if and only if both texts and the tokenizer are."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    fingerprint: str


def load(data: DataSettings, root: Path, vocab_size: int, progress: Progress = silent, believe_since_ns: int = 0) -> Corpus:
    """The corpus that `data` describes, for a model with `vocab_size` tokens (it may have more than the tokenizer).

    Every rank calls this at the same time: the first one prepares what is not in data.cache (a relative path starts at `root`),
    the others wait and say so. `progress` is called in the process that does the work. What was prepared before is opened without being
    read, however large it is. `believe_since_ns`: what was found by reading files before that time.time_ns() is found again.
    """
    check(data, root, vocab_size)
    tokenizer = load_tokenizer(data, root, progress, believe_since_ns)
    _refuse_small_vocabulary(tokenizer.vocab_size, data, vocab_size)
    with cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress, believe_since_ns)
        train = _opened(data.train, root, tokenizer, cache)
        if splits.is_split(data.validation):
            train, validation, _ = (_identified(part) for part in splits.split(train, data.validation, data.train))
        else:
            validation = _opened(data.validation, root, tokenizer, cache)
        validation = stores.with_bytes(validation, tokenizer, cache)
    for store in (train, validation):
        if store.facts["max_id"] >= vocab_size:
            token_store.check_ids(store, vocab_size)
    digests = [store.facts["source_sha256"] for store in (train, validation)]
    return Corpus(tokenizer, train, validation, _join(*digests, tokenizer.fingerprint))


def load_tokenizer(data: DataSettings, root: Path, progress: Progress = silent, believe_since_ns: int = 0) -> Tokenizer:
    """The tokenizer alone, made as in `load` if it is not cached. Generation needs no more: no text is tokenized."""
    if tokenizer_file.is_file(data.tokenizer):
        return tokenizer_file.load(data.tokenizer, root)
    if not is_made_from_text(data.tokenizer):
        return fixed(data.tokenizer)
    stores.check_tokenizer(data.train, data.tokenizer)
    with contextlib.ExitStack() as work, cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress, believe_since_ns)

        def texts() -> Iterator[str]:  # taken only if there is no tokenizer yet
            advance = work.enter_context(progress(f"training {data.tokenizer} on {data.train}"))
            for text in _seen_texts(data, root):
                for piece in pieces(text):
                    yield piece
                    advance(len(piece))

        waiting = functools.partial(cache.waiting, f"training {data.tokenizer}")
        return trained(data.tokenizer, texts(), _trained_on(data, text_digest(data.train, root, cache)), folder, waiting)


def _seen_texts(data: DataSettings, root: Path) -> Iterator[str]:
    """The documents, or the beginning of a single one, that a tokenizer is trained on."""
    texts = documents.documents(data.train, root)
    if not _is_trained_on_a_part(data):
        return texts
    count = sum(1 for _ in documents.documents(data.train, root))
    if count > 1:
        return islice(texts, splits.borders(data.validation, count)[1])
    return (text[: splits.borders(data.validation, len(text))[1]] for text in texts)


def _trained_on(data: DataSettings, train_digest: str) -> str:
    """The digest of what a tokenizer is trained on: of data.train, or of its training part if the held-out text is another part of it."""
    return _join(train_digest, data.validation) if _is_trained_on_a_part(data) else train_digest


def _is_trained_on_a_part(data: DataSettings) -> bool:
    """Whether the tokenizer does not see the held-out part of data.train. Characters are taken from all of it, so that none is unknown."""
    return splits.is_split(data.validation) and data.tokenizer.startswith(TRAINED)


def held_out_store(
    data: DataSettings, spec: str, root: Path, tokenizer: Tokenizer, progress: Progress = silent, counts_bytes: bool = True
) -> TokenStore:
    """The token store of another text, or of data.validation, tokenized as the run's own corpus and made as in `load`.

    `counts_bytes` False: the bytes of its text are not counted where that means to decode all of it.
    """
    with cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress)
        if splits.is_split(spec):
            _, store, _ = splits.split(_opened(data.train, root, tokenizer, cache), spec, data.train)
        else:
            store = _opened(spec, root, tokenizer, cache)
        return stores.with_bytes(store, tokenizer, cache) if counts_bytes else store


def digest(data: DataSettings, spec: str, root: Path, progress: Progress = silent) -> str:
    """SHA-256 (hex) of a text: equal digests mean equal documents. It is read only if it has changed since it was read last."""
    with cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress)
        if splits.is_split(spec):
            return _join(text_digest(data.train, root, cache), spec)
        return text_digest(spec, root, cache)


def text_digest(spec: str, root: Path, cache: Cache) -> str:
    """`digest` of a text that is not a split."""
    if stores.is_store(spec):
        return stores.digest(spec, root, cache)
    paths = documents.paths(spec, root)
    size = sum(path.stat().st_size for path in paths)

    def find() -> dict[str, str]:
        with cache.progress(f"hashing {spec} ({megabytes(size)})") if size > LONG else silent(""):
            return {"sha256": documents.digest(spec, root)}

    return str(cache.remembered("text", paths, f"hashing {spec}", find)["sha256"])


def tokenizer_at_hand(data: DataSettings, root: Path) -> Tokenizer | None:
    """The tokenizer if it is available at once: in a file of its own, or cached for a built-in text. None otherwise."""
    if tokenizer_file.is_file(data.tokenizer) or not is_made_from_text(data.tokenizer):
        return load_tokenizer(data, root)
    if not data.train.startswith(documents.BUILTIN):  # it may be long, and its digest needs all of it
        return None
    return kept(data.tokenizer, _trained_on(data, documents.digest(data.train, root)), Path(root) / Path(data.cache).expanduser())


def same_tokenizer(then: DataSettings, now: DataSettings, root: Path) -> bool:
    """Whether two settings name one tokenizer, as far as its file, or the text that it is trained on, can be found."""
    paths = [tokenizer_file.path_of(data.tokenizer, root) for data in (then, now)]
    if then.tokenizer != now.tokenizer:
        return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()
    if not is_made_from_text(now.tokenizer) or (then.train == now.train and _trained_on(then, "") == _trained_on(now, "")):
        return True
    try:
        return _trained_on(then, digest(then, then.train, root)) == _trained_on(now, digest(now, now.train, root))
    except Mistake:  # the text is not there any more
        return False


def check_text(spec: str, root: Path, setting: str) -> None:
    """Refuse a text, or a token store, that is not there. Reads no text, imports no torch."""
    if stores.is_store(spec):
        stores.check(spec, root, setting)
    else:
        documents.check_exists(spec, root, setting)


def check(data: DataSettings, root: Path, vocab_size: int) -> None:
    """Refuse, in milliseconds and before torch is imported, missing files, unknown names and a vocabulary that is too small."""
    check_text(data.train, root, "data.train")
    if splits.is_split(data.validation):
        splits.shares(data.validation)
    else:
        check_text(data.validation, root, "data.validation")
    is_file = tokenizer_file.is_file(data.tokenizer)
    declared = tokenizer_file.declared_vocab_size(data.tokenizer, root) if is_file else declared_vocab_size(data.tokenizer)
    stores.check_tokenizer(data.train, data.tokenizer)
    _refuse_small_vocabulary(declared, data, vocab_size)


def _refuse_small_vocabulary(tokens: int, data: DataSettings, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise Mistake(
            f"model.vocab_size = {vocab_size} has no room for the {tokens} tokens of data.tokenizer = "
            f"{data.tokenizer!r} → set model.vocab_size = {tokens}"
        )


def held_out(corpus: Corpus, tokens: int) -> HeldOut:
    """The first `tokens` tokens to predict of the held-out text, of which the very first is only read; 0, or too many: all of them."""
    store = corpus.validation
    there = store.num_tokens - 1
    if there < 1:
        raise Mistake(f"the validation corpus {store.prefix.name} has {store.num_tokens} token, nothing to predict → use more text")
    tokens = min(tokens, there) if tokens else there
    return HeldOut(store, tokens, leading_bytes(store, corpus.tokenizer, tokens + 1))


def refuse_same_text(data: DataSettings, corpus: Corpus) -> None:
    """Raises a Mistake if training and held-out text are copies of one file, whatever their names."""
    if corpus.train.facts.get("source_sha256") == corpus.validation.facts.get("source_sha256"):
        raise Mistake(
            f"data.validation = {data.validation!r} has the same content as data.train = {data.train!r} → "
            "name a text that is not trained on"
        )


def leading_bytes(store: TokenStore, tokenizer: Tokenizer, count: int) -> int:
    """UTF-8 bytes of the text of the store's first `count` tokens: a character counts with its last token, end-of-text with none."""
    if count >= store.num_tokens:
        return store.num_bytes
    total = 0
    for start, end in store.documents():
        if start >= count:
            break
        stop = min(end, count)
        text = tokenizer.decode(stores.without(store.tokens[start:stop], tokenizer.end_of_text))
        if stop < end:  # a character that is not complete is decoded as U+FFFD, which a few more tokens change (unless it is one)
            longer = stores.without(store.tokens[start : min(end, stop + TOKENS_PER_CHARACTER)], tokenizer.end_of_text)
            text = os.path.commonprefix([text, tokenizer.decode(longer)])
        total += len(text.encode("utf-8"))
    return total


@contextlib.contextmanager
def cache_folder(name: str, root: Path) -> Iterator[Path]:
    """The folder data.cache, created if it is missing. An error of the file system inside is a Mistake that names data.cache."""
    folder = Path(root) / Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise Mistake(f"data.cache = {name!r} cannot be used ({error}) → name a folder that you may write to") from error


def _opened(spec: str, root: Path, tokenizer: Tokenizer, cache: Cache) -> TokenStore:
    """The store that `spec` names, or that of a text, from the cache or made now. One in the cache that is damaged is made again."""
    if stores.is_store(spec):
        return stores.load(spec, root, tokenizer, cache)
    digest = text_digest(spec, root, cache)
    # the file name tells a person which corpus and tokenizer it is; the hash beside them is what counts
    labels = (re.sub(r"[^A-Za-z0-9_.]+", "-", name.removeprefix(documents.BUILTIN)).strip("-.")[-60:] for name in (spec, tokenizer.name))
    prefix = cache.folder / f"{'-'.join(labels)}-{_join(digest, tokenizer.fingerprint)[:16]}-v{RECIPE}"
    store = _cached(prefix, spec, cache)
    if store is not None:
        return store
    with locked(Path(f"{prefix}.lock"), functools.partial(cache.waiting, f"tokenizing {spec}")):
        if (store := _cached(prefix, spec, cache)) is None:
            facts = {"source": spec, "source_sha256": digest, "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.fingerprint}
            with cache.progress(f"tokenizing {spec}") as advance:
                encoded = _encoded(documents.documents(spec, root), tokenizer, advance)
                token_store.write(prefix, encoded, tokenizer.vocab_size, facts)
    return store or TokenStore(prefix)


def _cached(prefix: Path, spec: str, cache: Cache) -> TokenStore | None:
    """The store in the cache, whose largest id is known; None if there is none, it is damaged, or its text was empty."""
    try:
        store = TokenStore(prefix)
        if not store.num_bytes:
            return None
        store.facts |= stores.known(store, cache, f"the tokens of {spec}")
    except Mistake:
        return None
    return store


def _identified(part: TokenStore) -> TokenStore:
    """A part of a store, with a source_sha256 of its own."""
    first, documents_ = part.facts["first_document"], part.num_documents
    words = [f"documents {first} to {first + documents_}"]
    if "first_token" in part.facts:
        words.append(f"{part.num_tokens} tokens from {part.facts['first_token']}")
    part.facts["source_sha256"] = _join(part.facts["source_sha256"], *words)
    return part


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, advance: Advance) -> Iterator[tuple[np.ndarray, int]]:
    """Each text's ids, end-of-text last, and its UTF-8 bytes. Works on GROUP characters at a time, however long a text is."""
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


def _join(*digests: str) -> str:
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()
