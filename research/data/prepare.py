"""Preparing a corpus: tokenizer and token stores, made once by whichever process comes first and cached under data.cache."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from parallel.errors import Mistake
from parallel.files import locked
from research.data import documents, token_store, tokenizer_file
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer, declared_vocab_size, fixed, is_made_from_text, kept, pieces, trained

RECIPE = 1
"""Part of every store's name. Raise it whenever the same text would give other tokens."""
GROUP = 1 << 22
"""Characters tokenized at a time: enough for all cores, little enough for any memory."""

CHARACTER = 4
"""The most tokens that one character can have: a byte each."""

Advance = Callable[[int], object]
Progress = Callable[[str], AbstractContextManager[Advance]]
"""Called with what begins; the context lasts as long as it does, and is told how many more characters are done."""


def silent(what: str) -> AbstractContextManager[Advance]:
    """The Progress that shows nothing."""
    return contextlib.nullcontext(lambda characters: None)


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


def load(data: DataSettings, root: Path, vocab_size: int, progress: Progress = silent) -> Corpus:
    """The corpus that `data` describes, for a model with `vocab_size` tokens (it may have more than the tokenizer).

    Every rank calls this at the same time: the first one prepares what is not in data.cache (a relative path starts at `root`),
    the others wait. `progress` is called in the process that does the work.
    """
    check(data, root, vocab_size)
    tokenizer = load_tokenizer(data, root, progress)
    _refuse_small_vocabulary(tokenizer.vocab_size, data, vocab_size)
    digests = [documents.digest(spec, root) for spec in (data.train, data.validation)]
    with cache_folder(data.cache, root) as cache:
        train, validation = (
            _prepared(spec, digest, tokenizer, root, cache, progress)
            for spec, digest in zip((data.train, data.validation), digests, strict=True)
        )
    for store in (train, validation):
        token_store.check_ids(store, vocab_size)
    return Corpus(tokenizer, train, validation, _join(*digests, tokenizer.fingerprint))


def load_tokenizer(data: DataSettings, root: Path, progress: Progress = silent) -> Tokenizer:
    """The tokenizer alone, made as in `load` if it is not cached. Generation needs no more: no text is tokenized."""
    if tokenizer_file.is_file(data.tokenizer):
        return tokenizer_file.load(data.tokenizer, root)
    if not is_made_from_text(data.tokenizer):
        return fixed(data.tokenizer)
    digest = documents.digest(data.train, root)
    with contextlib.ExitStack() as work, cache_folder(data.cache, root) as cache:

        def texts() -> Iterator[str]:  # taken only if there is no tokenizer yet
            advance = work.enter_context(progress(f"training {data.tokenizer} on {data.train}"))
            for text in documents.documents(data.train, root):
                for piece in pieces(text):
                    yield piece
                    advance(len(piece))

        return trained(data.tokenizer, texts(), digest, cache)


def split(data: DataSettings, spec: str, root: Path, tokenizer: Tokenizer, progress: Progress = silent) -> TokenStore:
    """The token store of another text, tokenized as the run's own corpus and made as in `load` if it is not cached."""
    digest = documents.digest(spec, root)
    with cache_folder(data.cache, root) as cache:
        return _prepared(spec, digest, tokenizer, root, cache, progress)


def tokenizer_at_hand(data: DataSettings, root: Path) -> Tokenizer | None:
    """The tokenizer if it is available at once: in a file of its own, or cached for a built-in text. None otherwise."""
    if tokenizer_file.is_file(data.tokenizer) or not is_made_from_text(data.tokenizer):
        return load_tokenizer(data, root)
    if not data.train.startswith(documents.BUILTIN):  # it may be long, and its digest needs all of it
        return None
    return kept(data.tokenizer, documents.digest(data.train, root), Path(root) / Path(data.cache).expanduser())


def same_tokenizer(then: DataSettings, now: DataSettings, root: Path) -> bool:
    """Whether two settings name one tokenizer, as far as its file, or the text that it is trained on, can be found."""
    paths = [tokenizer_file.path_of(data.tokenizer, root) for data in (then, now)]
    if then.tokenizer != now.tokenizer:
        return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()
    if not is_made_from_text(now.tokenizer) or then.train == now.train:
        return True
    try:
        return documents.digest(then.train, root) == documents.digest(now.train, root)
    except Mistake:  # the text is not there any more
        return False


def check(data: DataSettings, root: Path, vocab_size: int) -> None:
    """Refuse, in milliseconds and before torch is imported, missing files, unknown names and a vocabulary that is too small."""
    documents.check_exists(data.train, root, "data.train")
    documents.check_exists(data.validation, root, "data.validation")
    is_file = tokenizer_file.is_file(data.tokenizer)
    declared = tokenizer_file.declared_vocab_size(data.tokenizer, root) if is_file else declared_vocab_size(data.tokenizer)
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
    for start, end in pairwise(store.document_offsets.tolist()):
        if start >= count:
            break
        ids, here = store.tokens[start : end - 1], count - start
        text = tokenizer.decode(ids[:here])
        if here < len(ids):  # a character that is not complete is decoded as U+FFFD, which a few more tokens change (unless it is one)
            text = os.path.commonprefix([text, tokenizer.decode(ids[: here + CHARACTER])])
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


def _prepared(spec: str, digest: str, tokenizer: Tokenizer, root: Path, cache: Path, progress: Progress) -> TokenStore:
    """The token store of one split, from the cache or made now. A damaged one in the cache is made again."""
    # the file name tells a person which corpus and tokenizer it is; the hash beside them is what counts
    labels = (re.sub(r"[^A-Za-z0-9_.]+", "-", name.removeprefix(documents.BUILTIN)).strip("-.")[-60:] for name in (spec, tokenizer.name))
    prefix = cache / f"{'-'.join(labels)}-{_join(digest, tokenizer.fingerprint)[:16]}-v{RECIPE}"
    store = _open(prefix)
    if store is not None:
        return store
    with locked(Path(f"{prefix}.lock")):
        if _open(prefix) is None:
            facts = {"source": spec, "source_sha256": digest, "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.fingerprint}
            with progress(f"tokenizing {spec}") as advance:
                encoded = _encoded(documents.documents(spec, root), tokenizer, advance)
                token_store.write(prefix, encoded, tokenizer.vocab_size, facts)
    return TokenStore(prefix)


def _open(prefix: Path) -> TokenStore | None:
    """The store in the cache; None if there is none, it is damaged, or its text was empty."""
    try:
        store = TokenStore(prefix)
        return store if store.num_bytes else None
    except Mistake:
        return None


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
