"""A tokenizer.json of the tokenizers library as data.tokenizer names it: data of a stranger, of which nothing is executed.

Beside it may lie tokenizer_config.json, which names the token that ends a text.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.data import documents
from research.data.tokenizer import END_OF_TEXT, Tokenizer

CONFIG = "tokenizer_config.json"
LARGEST = 256 * 2**20
"""Bytes of a tokenizer.json; one of 256 thousand tokens has 33 MB."""
LONGEST_TEMPLATE = 2**20
"""Characters of a chat template."""
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""What the token that ends a text is called where no tokenizer_config.json says it."""
WAY_OUT = "give it a tokenizer.json as Hugging Face's tokenizers saves it"


def is_file(name: str) -> bool:
    """Whether data.tokenizer names a file rather than a tokenizer of ours."""
    return name.endswith(".json") and not name.startswith(documents.BUILTIN)


def declared_vocab_size(name: str, root: Path) -> int:
    """One more than the highest id in the file. Imports nothing heavy."""
    return _size(path_of(name, root), _table(path_of(name, root)))


def path_of(name: str, root: Path) -> Path:
    """Where the file lies; a relative path starts at `root`."""
    return Path(root) / Path(name).expanduser()


def load(name: str, root: Path) -> Tokenizer:
    """The tokenizer in the file, its own normaliser and all: `decode` of `encode` is then not always the same text."""
    path = path_of(name, root)
    table = _table(path)
    backend = parsed(path)
    marker = end_of_text(path, table)
    identifier = backend.token_to_id(marker)
    if identifier is None:
        raise Mistake(f"{path} has no token {marker!r:.80}, with which {path.with_name(CONFIG).name} ends a text → {WAY_OUT}")
    fingerprint = hashlib.sha256(path.read_bytes() + b"\0" + marker.encode()).hexdigest()
    return Tokenizer(name, _size(path, table), identifier, fingerprint, backend, cuts=False, begin=_begin(backend))


def parsed(path: Path) -> Any:
    """The library's tokenizer, which takes the letters of special tokens for text, and neither cuts nor pads."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics of Rust, which are none
        raise Mistake(f"{path} is not a tokenizer ({' '.join(str(error).split())[:120]}) → {WAY_OUT}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _begin(backend: Any) -> tuple[int, ...]:
    """The ids that the tokenizer's own post-processor puts in front of a text. What it puts behind one is left out: it ends texts."""
    text, marked = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = (at for at in range(len(marked) - len(text) + 1) if marked[at : at + len(text)] == text)
    return tuple(marked[: next(places, 0)])


def end_of_text(path: Path, table: dict[str, Any]) -> str:
    """The token that ends a text: tokenizer_config.json's eos_token, or one that is usually called so."""
    said = token_text(read_table(path.with_name(CONFIG)).get("eos_token")) if path.with_name(CONFIG).is_file() else None
    if said:
        return said
    known = _names(table)
    for name in ENDS:
        if name in known:
            return name
    raise Mistake(f"{path} does not say which token ends a text → name it in {CONFIG} beside it: {{'eos_token': '</s>'}}")


def token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json names it: text, or a table with its `content`; None for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and 0 < len(content) <= 200 else None


def read_table(path: Path, largest: int = 16 * 2**20) -> dict[str, Any]:
    """A JSON table of at most `largest` bytes. Whatever else it is, is a Mistake."""
    try:
        if path.stat().st_size > largest:
            raise Mistake(f"{path} has {path.stat().st_size} bytes, more than {largest} → is it the right file?")
        table = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → check the file and its permissions") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{path} is not JSON ({str(error)[:120]}) → is it the right file?") from None
    if not isinstance(table, dict):
        raise Mistake(f"{path} holds a {type(table).__name__}, not a table → is it the right file?")
    return table


def _no_constant(value: str) -> float:
    raise ValueError(f"{value} is not JSON")


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Mistake(f"data.tokenizer: {path} does not exist → name a tokenizer.json, or use builtin:bpe-8192 or builtin:gpt2")
    return read_table(path, LARGEST)


def _tokens(table: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(token, id) of each: a vocabulary is a table, or a list whose places are ids; added tokens come beside it."""
    model = table.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = table.get("added_tokens")
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):
        yield from ((entry[0] if isinstance(entry, list) and entry else None, i) for i, entry in enumerate(vocabulary))
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")


def _size(path: Path, table: dict[str, Any]) -> int:
    highest = max((number for _, number in _tokens(table) if isinstance(number, int)), default=-1)
    if highest < 0:
        raise Mistake(f"{path} holds no tokens → {WAY_OUT}")
    return 1 + highest


def _names(table: dict[str, Any]) -> set[str]:
    return {name for name, _ in _tokens(table) if isinstance(name, str)}


FILE, TEMPLATE, GENERATION = "tokenizer.json", "chat_template.jinja", "generation_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def ends_of(words: Tokenizer, root: Path) -> tuple[int, ...]:
    """The ids at which a text ends: those that the generation_config.json beside a tokenizer.json names, and end-of-text."""
    told = _beside(words, root, GENERATION).get("eos_token_id")
    named = told if isinstance(told, list) else [told]
    return tuple(dict.fromkeys([words.end_of_text, *(named if _are_ids(told) else ())]))


def template_of(words: Tokenizer, root: Path) -> str | None:
    """The chat template beside a tokenizer.json, where there is one."""
    if not is_file(words.name):
        return None
    found = _template(path_of(words.name, root).parent, _beside(words, root, CONFIG))
    return found if isinstance(found, str) and 0 < len(found) <= LONGEST_TEMPLATE else None


def special_tokens_of(words: Tokenizer, root: Path) -> dict[str, str]:
    """{"bos_token": "<s>", …}: those that the tokenizer_config.json beside a tokenizer.json names."""
    told = _beside(words, root, CONFIG)
    return {name: token for name in SPECIAL if (token := token_text(told.get(name)))}


def _beside(words: Tokenizer, root: Path, name: str) -> dict[str, Any]:
    """A table in the folder of a run's tokenizer.json; empty where there is none."""
    if not is_file(words.name):
        return {}
    path = path_of(words.name, root).with_name(name)
    return read_table(path) if path.is_file() else {}


def _template(source: Path, told: Mapping[str, Any]) -> Any:
    """From its own file, or from tokenizer_config.json, where it may be one of several with names."""
    if (source / TEMPLATE).is_file() and (source / TEMPLATE).stat().st_size <= LONGEST_TEMPLATE:
        return (source / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    found = told.get("chat_template")
    named = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return next((entry.get("template") for entry in named if entry.get("name") == "default"), None if isinstance(found, list) else found)


def _are_ids(value: Any) -> bool:
    """One, or a list of some."""
    if isinstance(value, list):
        return 0 < len(value) <= 100 and not any(isinstance(entry, list) for entry in value) and all(map(_are_ids, value))
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
