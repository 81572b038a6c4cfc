"""Text prepared once: tokenizer and token stores, made by whichever process comes first and kept under data.cache."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from parallel.errors import Mistake
from parallel.files import locked
from research.data import documents, token_store, tokenizer, tokenizer_file
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

RECIPE = 1
"""Part of every store's name: raise it whenever the same text would give other tokens."""
GROUP = 1 << 22
"""Characters tokenized at a time: enough for all cores, little enough for any memory."""

Progress = Callable[[str], None]


class Settings(Protocol):
    """What is needed of research.config.Data."""

    train: str
    validation: str
    tokenizer: str
    cache: str


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `fingerprint` is equal exactly where both texts and the tokenizer are."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    fingerprint: str


def load(data: Settings, root: Path, vocab_size: int, progress: Progress | None = None) -> Corpus:
    """The corpus that `data` describes, for a model with `vocab_size` tokens (more than the tokenizer's is fine).

    Call it on every rank at once: the first to come prepares what is not in data.cache (a relative path starts at `root`),
    the others wait. `progress` hears, in the process that does the work, what is being done.
    """
    check(data, root, vocab_size)
    words = load_tokenizer(data, root, progress)
    digests = [documents.digest(spec, root) for spec in (data.train, data.validation)]
    with cache_folder(data.cache, root) as cache:
        train, validation = (
            _prepared(spec, digest, words, root, cache, progress)
            for spec, digest in zip((data.train, data.validation), digests, strict=True)
        )
    for split in (train, validation):
        token_store.check_ids(split, vocab_size)
    return Corpus(words, train, validation, _join(*digests, words.fingerprint))


def load_tokenizer(data: Settings, root: Path, progress: Progress | None = None) -> Tokenizer:
    """The tokenizer alone (to generate, no text need be tokenized), made as in `load` if it is not cached."""
    if tokenizer_file.is_file(data.tokenizer):
        return tokenizer_file.load(data.tokenizer, root)
    if data.tokenizer == tokenizer.GPT2:
        return tokenizer.gpt2()
    digest = documents.digest(data.train, root)
    texts = _announced(documents.documents(data.train, root), f"training {data.tokenizer} on {data.train}", progress)
    with cache_folder(data.cache, root) as cache:
        return tokenizer.trained(data.tokenizer, texts, digest, cache)


def split(data: Settings, spec: str, root: Path, words: Tokenizer, progress: Progress | None = None) -> TokenStore:
    """Another text as the run would read it: the store of one corpus, made as in `load` if it is not cached."""
    digest = documents.digest(spec, root)
    with cache_folder(data.cache, root) as cache:
        return _prepared(spec, digest, words, root, cache, progress)


def tokenizer_at_hand(data: Settings, root: Path) -> Tokenizer | None:
    """The tokenizer where it can be had in a moment: its own file, or one that is kept for a built-in text. None where not."""
    if tokenizer_file.is_file(data.tokenizer) or data.tokenizer == tokenizer.GPT2:
        return load_tokenizer(data, root)
    if not data.train.startswith(documents.BUILTIN):  # it may be long, and it must be read to know its digest
        return None
    return tokenizer.kept(data.tokenizer, documents.digest(data.train, root), Path(root) / Path(data.cache).expanduser())


def check(data: Settings, root: Path, vocab_size: int) -> None:
    """Refuse in milliseconds, before torch is imported, what can be seen without reading: files, names, vocabulary."""
    documents.check_exists(data.train, root, "data.train")
    documents.check_exists(data.validation, root, "data.validation")
    is_file = tokenizer_file.is_file(data.tokenizer)
    declared = tokenizer_file.declared_vocab_size(data.tokenizer, root) if is_file else tokenizer.declared_vocab_size(data.tokenizer)
    if declared > vocab_size:
        raise Mistake(
            f"model.vocab_size = {vocab_size} has no room for the {declared} tokens of data.tokenizer = "
            f"{data.tokenizer!r} → set model.vocab_size = {declared}"
        )


@contextlib.contextmanager
def cache_folder(name: str, root: Path) -> Iterator[Path]:
    """The folder, made if need be; a file system that refuses is a Mistake naming data.cache."""
    folder = Path(root) / Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise Mistake(f"data.cache = {name!r} cannot be used ({error}) → name a folder that you may write to") from error


def _prepared(spec: str, digest: str, words: Tokenizer, root: Path, cache: Path, progress: Progress | None) -> TokenStore:
    """The token store of one split, from the cache or made now. A cached one that is not whole is made again."""
    key = _join(digest, words.fingerprint)[:16]
    prefix = cache / f"{_label(spec)}-{_label(words.name)}-{key}-v{RECIPE}"
    found = _open(prefix)
    if found is not None:
        return found
    with locked(Path(f"{prefix}.lock")):
        if _open(prefix) is None:
            texts = _announced(documents.documents(spec, root), f"tokenizing {spec}", progress)
            facts = {"source": spec, "source_sha256": digest, "tokenizer": words.name, "tokenizer_sha256": words.fingerprint}
            token_store.write(prefix, _encoded(texts, words), words.vocab_size, facts)
    return TokenStore(prefix)


def _open(prefix: Path) -> TokenStore | None:
    try:
        found = TokenStore(prefix)
        return found if found.num_bytes else None
    except Mistake:
        return None


def _announced(texts: Iterator[str], what: str, progress: Progress | None) -> Iterator[str]:
    """The texts; `progress` hears of it once the first is asked for, so only where there is something to do."""
    if progress:
        progress(what)
    yield from texts


def _encoded(texts: Iterable[str], words: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Each text's ids, end-of-text last, and its UTF-8 bytes. Works on GROUP characters at a time, however long a text is."""
    ids, num_bytes = [], 0
    for group in _groups(_parts(texts, words)):
        found = words.encode_batch([part for part, _ in group])
        for (part, ends), part_ids in zip(group, found, strict=True):
            ids.append(np.array(part_ids, np.int32))
            num_bytes += len(part.encode("utf-8"))
            if ends:
                yield np.concatenate([*ids, [words.end_of_text]]), num_bytes
                ids, num_bytes = [], 0


def _parts(texts: Iterable[str], words: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Every text's pieces in order, the last of each marked."""
    for text in texts:
        *first, last = words.pieces(text)
        yield from ((part, False) for part in first)
        yield last, True


def _groups(parts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part[0])
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def _label(spec: str) -> str:
    """A file name's part that tells a person which corpus it is; the hash beside it is what counts."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", spec.removeprefix(documents.BUILTIN)).strip("-.")[-60:]


def _join(*digests: str) -> str:
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()
