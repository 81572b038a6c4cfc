"""The corpus of a run: the token stores of its training and held-out texts, made once by whichever process comes first (text_stores.py)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parallel.errors import Mistake
from research.data import documents, splits, stores, token_store, tokenizer_file
from research.data.documents import Spec, each, label
from research.data.records import Cache, Progress, silent
from research.data.run_tokenizer import load_tokenizer
from research.data.sources import SHARED, DataSettings, own_held_out_texts, training_texts
from research.data.text_stores import cache_folder, joined, opened, text_digest
from research.data.token_store import TokenStore
from research.data.tokenizer import TOKENS_PER_CHARACTER, Tokenizer, declared_vocab_size


class HeldOut(NamedTuple):
    """What a validation predicts: `tokens` tokens of the store, from the second on, and the UTF-8 bytes of the text up to the last."""

    store: TokenStore
    tokens: int
    num_bytes: int
    source: str = SHARED
    """The name of the source that it is held out of."""


@dataclass(frozen=True)
class Corpus:
    """What a run reads: the stores of its sources and of its held-out texts, by the names of the sources."""

    tokenizer: Tokenizer
    sources: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    """Under SHARED the text of data.validation, unless that is a split; under the name of a source its part of the split or its own."""
    cache: Cache | None = None
    """Where what is computed from the stores is kept; None: nowhere."""

    @property
    def train(self) -> TokenStore:
        """The store of the only source."""
        (store,) = self.sources.values()
        return store

    @property
    def validation(self) -> TokenStore:
        """The store of the first held-out text."""
        return next(iter(self.held_out.values()))

    @property
    def fingerprint(self) -> str:
        """Two fingerprints are equal if and only if all texts and the tokenizer are."""
        return self.fingerprint_of(self.sources)

    def fingerprint_of(self, names: Iterable[str]) -> str:
        """The fingerprint that this corpus would have if these were all of its sources, in this order."""
        names = list(names)
        trained = [self.sources[name].facts["source_sha256"] for name in names]
        held_out = [store.facts["source_sha256"] for name, store in self.held_out.items() if name in (SHARED, *names)]
        if len(names) == 1:
            return joined(*trained, *held_out, self.tokenizer.fingerprint)
        return joined(str(len(names)), *names, *trained, *held_out, self.tokenizer.fingerprint)


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
        train = {name: opened(text, root, tokenizer, cache) for name, text in training_texts(data.train).items()}
        if splits.is_split(data.validation):
            parts = {name: _parts(store, data.validation) for name, store in train.items()}
            train = {name: first for name, (first, _, _) in parts.items()}
            held_out = {name: second for name, (_, second, _) in parts.items()}
        else:
            texts = {SHARED: data.validation, **own_held_out_texts(data.train)}
            held_out = {name: opened(text, root, tokenizer, cache) for name, text in texts.items()}
        held_out = {name: stores.with_bytes(store, tokenizer, cache) for name, store in held_out.items()}
    for store in (*train.values(), *held_out.values()):
        if store.facts["max_id"] >= vocab_size:
            token_store.check_ids(store, vocab_size)
    return Corpus(tokenizer, train, held_out, cache)


def _parts(store: TokenStore, spec: str) -> list[TokenStore]:
    """The parts of a split, each with a source_sha256 of its own."""
    parts = splits.split(store, spec, store.facts["source"])
    for part in parts:
        first, last = part.facts["first_document"], part.facts["first_document"] + part.num_documents
        words = [f"documents {first} to {last}"]
        if "first_token" in part.facts:
            words.append(f"{part.num_tokens} tokens from {part.facts['first_token']}")
        part.facts["source_sha256"] = joined(part.facts["source_sha256"], *words)
    return parts


def held_out_stores(
    data: DataSettings, spec: str, root: Path, tokenizer: Tokenizer, progress: Progress = silent, counts_bytes: bool = True
) -> list[TokenStore]:
    """The token stores of another text, or of data.validation, tokenized as the run's own corpus and made as in `load`.

    There is one, but for a split of several sources: then one for each. `counts_bytes` False: the bytes of a text are not counted where
    that means to decode all of it.
    """
    with cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress)
        if splits.is_split(spec):
            found = [_parts(opened(text, root, tokenizer, cache), spec)[1] for text in training_texts(data.train).values()]
        else:
            found = [opened(spec, root, tokenizer, cache)]
        return [stores.with_bytes(store, tokenizer, cache) for store in found] if counts_bytes else found


def digest(data: DataSettings, spec: str, root: Path, progress: Progress = silent) -> str:
    """SHA-256 (hex) of a text, or of data.validation: equal digests mean equal documents. It is read only if it has changed."""
    with cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress)
        if splits.is_split(spec):
            return joined(*(text_digest(text, root, cache) for text in training_texts(data.train).values()), spec)
        return text_digest(spec, root, cache)


def check_text(spec: Spec, root: Path, setting: str) -> None:
    """Refuse a text, or a token store, that is not there. Reads no text, imports no torch."""
    for name in each(spec):
        if not stores.is_store(name):
            documents.check_exists(name, root, setting)
        elif spec == name:
            stores.check(name, root, setting)
        else:
            raise Mistake(f"{setting} lists {name!r}: a store is not read as one text with others → give each Source(path=…, weight=…)")


def check(data: DataSettings, root: Path, vocab_size: int) -> None:
    """Refuse, in milliseconds and before torch is imported, missing files, unknown names and a vocabulary that is too small."""
    for text in training_texts(data.train).values():
        check_text(text, root, "data.train")
        stores.check_tokenizer(text, data.tokenizer)
    own = own_held_out_texts(data.train)
    for name, text in own.items():
        check_text(text, root, f"the validation of {name!r} in data.train")
    if not splits.is_split(data.validation):
        check_text(data.validation, root, "data.validation")
    elif splits.shares(data.validation) and own:
        name, text = next(iter(own.items()))
        raise Mistake(
            f"data.validation = {data.validation!r} holds a part of each source out, and {name!r} names a held-out text of its own, "
            f"{text!r} → use one of the two"
        )
    is_file = tokenizer_file.is_file(data.tokenizer)
    declared = tokenizer_file.declared_vocab_size(data.tokenizer, root) if is_file else declared_vocab_size(data.tokenizer)
    _refuse_small_vocabulary(declared, data, vocab_size)


def _refuse_small_vocabulary(tokens: int, data: DataSettings, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise Mistake(
            f"model.vocab_size = {vocab_size} has no room for the {tokens} tokens of data.tokenizer = "
            f"{data.tokenizer!r} → set model.vocab_size = {tokens}"
        )


def held_out_texts(corpus: Corpus, tokens: int) -> list[HeldOut]:
    """The first `tokens` tokens to predict of each held-out text, of which the very first is only read; 0, or too many: all of them."""
    found = []
    for source, store in corpus.held_out.items():
        there = store.num_tokens - 1
        if there < 1:
            raise Mistake(f"the validation corpus {store.prefix.name} has {store.num_tokens} token, nothing to predict → use more text")
        count = min(tokens, there) if tokens else there
        found.append(HeldOut(store, count, leading_bytes(store, corpus.tokenizer, count + 1), source))
    return found


def refuse_same_text(data: DataSettings, corpus: Corpus) -> None:
    """Raises a Mistake if a training and a held-out text are copies of one file, whatever their names."""
    trained = {store.facts.get("source_sha256"): name for name, store in corpus.sources.items()}
    for name, store in corpus.held_out.items():
        same = trained.get(store.facts.get("source_sha256"))
        if same is None:
            continue
        held_out = f"data.validation = {data.validation!r}" if name == SHARED else f"the held-out text of {name!r}"
        text = f"data.train = {label(training_texts(data.train)[same])!r}" if same == SHARED else f"the source {same!r} of data.train"
        raise Mistake(f"{held_out} has the same content as {text} → name a text that is not trained on")


def refuse_short_parts(data: DataSettings, corpus: Corpus, seq_length: int) -> None:
    """Raises a Mistake if the training or the held-out part of a split is shorter than one sample."""
    if not splits.is_split(data.validation):
        return
    for name, store in corpus.sources.items():
        splits.refuse_short(data.validation, store, corpus.held_out[name], seq_length)


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
