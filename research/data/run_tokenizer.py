"""The tokenizer that the settings name, made from the training texts where it has to be, and cached under data.cache."""

import contextlib
import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import user_path
from research.data import documents, splits, stores, tokenizer_file
from research.data.documents import Spec, label
from research.data.records import Cache, Progress, silent
from research.data.sources import DataSettings, training_texts
from research.data.text_stores import cache_folder, joined, text_digest
from research.data.tokenizer import TRAINED, Tokenizer, fixed, is_made_from_text, kept, pieces, trained


def load_tokenizer(data: DataSettings, root: Path, progress: Progress = silent, believe_since_ns: int = 0) -> Tokenizer:
    """The tokenizer alone, made as in `load` if it is not cached. Generation needs no more: no text is tokenized."""
    if tokenizer_file.is_file(data.tokenizer):
        return tokenizer_file.load(data.tokenizer, root)
    if not is_made_from_text(data.tokenizer):
        return fixed(data.tokenizer)
    texts = training_texts(data.train).values()
    for text in texts:
        stores.check_tokenizer(text, data.tokenizer)
    with contextlib.ExitStack() as work, cache_folder(data.cache, root) as folder:
        cache = Cache(folder, progress, believe_since_ns)

        def seen() -> Iterator[str]:  # taken only if there is no tokenizer yet
            names = ", ".join(label(text) for text in texts)
            advance = work.enter_context(progress(f"training {data.tokenizer} on {names}"))
            for text in texts:
                for document in _seen_texts(data, text, root):
                    for piece in pieces(document):
                        yield piece
                        advance(len(piece))

        waiting = functools.partial(cache.waiting, f"training {data.tokenizer}")
        return trained(data.tokenizer, seen(), _source(data, [text_digest(text, root, cache) for text in texts]), folder, waiting)


def _seen_texts(data: DataSettings, spec: Spec, root: Path) -> Iterator[str]:
    """The documents, or the beginning of a single one, of a training text that a tokenizer is trained on."""
    texts = documents.documents(spec, root)
    if not _is_trained_on_a_part(data):
        return texts
    count = sum(1 for _ in documents.documents(spec, root))
    if count > 1:
        return islice(texts, splits.borders(data.validation, count)[1])
    return (text[: splits.borders(data.validation, len(text))[1]] for text in texts)


def _source(data: DataSettings, digests: list[str]) -> str:
    """The digest of what a tokenizer is trained on: of the training texts, or of their training parts if the rest of them is held out."""
    words = [*digests, *([data.validation] if _is_trained_on_a_part(data) else [])]
    return joined(*words) if len(words) > 1 else words[0]


def _is_trained_on_a_part(data: DataSettings) -> bool:
    """Whether the tokenizer does not see the held-out part of data.train. Characters are taken from all of it, so that none is unknown."""
    return splits.is_split(data.validation) and data.tokenizer.startswith(TRAINED)


def tokenizer_at_hand(data: DataSettings, root: Path) -> Tokenizer | None:
    """The tokenizer if it is available at once: in a file of its own, or cached for a built-in text. None otherwise."""
    if tokenizer_file.is_file(data.tokenizer) or not is_made_from_text(data.tokenizer):
        return load_tokenizer(data, root)
    texts = list(training_texts(data.train).values())
    if not all(name.startswith(documents.BUILTIN) for text in texts for name in documents.each(text)):
        return None  # they may be long, and a digest needs all of them
    source = _source(data, [documents.digest(text, root) for text in texts])
    return kept(data.tokenizer, source, user_path(root, data.cache))


def same_tokenizer(then: DataSettings, now: DataSettings, root: Path) -> bool:
    """Whether two settings name one tokenizer, as far as its file, or the text that it is trained on, can be found."""
    paths = [tokenizer_file.path_of(data.tokenizer, root) for data in (then, now)]
    if then.tokenizer != now.tokenizer:
        return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()
    if not is_made_from_text(now.tokenizer):
        return True
    texts = [list(training_texts(data.train).values()) for data in (then, now)]
    if texts[0] == texts[1] and _source(then, [""]) == _source(now, [""]):
        return True
    try:
        return _found_source(then, root) == _found_source(now, root)
    except Mistake:  # a text is not there any more
        return False


def _found_source(data: DataSettings, root: Path) -> str:
    with cache_folder(data.cache, root) as folder:
        return _source(data, [text_digest(text, root, Cache(folder, silent)) for text in training_texts(data.train).values()])
