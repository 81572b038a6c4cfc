"""Tokenizers from a tokenizer.json of the tokenizers library, as data.tokenizer names it, and the files that lie beside one.

    tokenizer.json          the library's tokenizer
    tokenizer_config.json   names the token that ends a text, and other special tokens
    generation_config.json  ids at which generation ends
    chat_template.jinja     turns a conversation into text

All of these come from unknown sources: they are read as data and nothing in them is executed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel import regular_files
from parallel.errors import Mistake
from parallel.files import user_path
from parallel.regular_files import LARGEST_JSON, check_inside, read_regular
from parallel.text import decoded
from research.data import documents, tokenizer_costs
from research.data.tokenizer import END_OF_TEXT, Tokenizer, known_letters, library_error

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
LARGEST, MOST_VALUES = 128 * 2**20, 2**22
"""The most bytes and values of a tokenizer.json; one of 256 thousand tokens has 33 MB and two million values."""
LONGEST_TEMPLATE = 2**20
"""The most characters of a chat template."""
MOST_BEGIN = 256
"""The most tokens that a post-processor puts in front of a text, or behind it."""
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""The usual names of the token that ends a text, for a tokenizer.json without a tokenizer_config.json."""
RIGHT_FILE = "is it the right file?"
WAY_OUT = "give it a tokenizer.json as Hugging Face's tokenizers saves it"


def is_file(name: str) -> bool:
    """Whether data.tokenizer names a file rather than a built-in tokenizer."""
    return name.endswith(".json") and not name.startswith(documents.BUILTIN)


def path_of(name: str, root: Path) -> Path:
    """The path of the file; a relative path starts at `root`."""
    return user_path(root, name)


def declared_vocab_size(name: str, root: Path) -> int:
    """One more than the highest id in the file. Imports nothing heavy."""
    path = path_of(name, root)
    return _vocab_size(path, _table(path, _content(path)))


def load(name: str, root: Path) -> Tokenizer:
    """The tokenizer in the file, its own normaliser included: `decode` of `encode` is then not always the same text."""
    path = path_of(name, root)
    content = _content(path)  # read once: what is checked is what is used
    table = _table(path, content)
    backend = _parsed(path, content, table)
    marker = end_of_text(path, table)
    marker_id = backend.token_to_id(marker)
    if marker_id is None:
        raise Mistake(f"{path} has no token {marker!r:.80}, with which {CONFIG} ends a text → {WAY_OUT}")
    fingerprint = hashlib.sha256(content + b"\0" + marker.encode()).hexdigest()

    # what the file's post-processor puts around a text
    probe = known_letters(backend, "a") or next((token for token in backend.get_vocab() if token != marker), "")
    try:
        text, marked = (backend.encode(probe, add_special_tokens=special).ids for special in (False, True))
    except BaseException as error:
        raise library_error(error, f"{path} cannot encode the text {probe!r:.40}") from None
    places = range(min(len(marked) - len(text), MOST_BEGIN) + 1)
    starts = (start for start in places if marked[start : start + len(text)] == text)
    start = next(starts, None)
    begin, behind = ((), ()) if start is None else (tuple(marked[:start]), tuple(marked[start + len(text) :][:MOST_BEGIN]))
    return Tokenizer(name, _vocab_size(path, table), marker_id, fingerprint, backend, cuts=False, begin=begin, behind=behind)


def parsed(path: Path) -> Any:
    """The library's tokenizer in a file, set to encode the letters of special tokens as text, and neither to truncate nor to pad.

    A Mistake if it is no tokenizer, or one that makes much of little text.
    """
    content = _content(path)
    return _parsed(path, content, _table(path, content))


def _parsed(path: Path, content: bytes, table: dict[str, Any]) -> Any:
    """`parsed` of a file's bytes, whose table is `table`."""
    from tokenizers import Tokenizer as Backend

    tokenizer_costs.check(table, path)
    try:
        backend = Backend.from_buffer(content)
    except BaseException as error:
        raise library_error(error, f"{path} is not a tokenizer", WAY_OUT) from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def end_of_text(path: Path, table: dict[str, Any]) -> str:
    """The token that ends a text: tokenizer_config.json's eos_token, or else one of the usual names."""
    config = path.with_name(CONFIG)
    named = token_text(read_tokenizer_table(check_inside(config, config.parent)).get("eos_token")) if config.is_file() else None
    if named:
        return named
    known = {name for name, _ in _tokens(table) if isinstance(name, str)}
    for name in ENDS:
        if name in known:
            return name
    raise Mistake(f"{path} does not say which token ends a text → name it in {CONFIG} beside it: {{'eos_token': '</s>'}}")


def token_text(value: Any) -> str | None:
    """A token as tokenizer_config.json names it: text, or a table with its `content`; None for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and 0 < len(content) <= 200 else None


def read_tokenizer_table(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON table of at most `largest` bytes and MOST_VALUES values in a regular file. Anything else is a Mistake."""
    try:
        return regular_files.read_table(path, RIGHT_FILE, largest, MOST_VALUES)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> Mistake:
    return Mistake(f"{path} cannot be read ({error.strerror or error}) → check the file and its permissions")


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise Mistake(f"data.tokenizer: {path} does not exist → name a tokenizer.json, or use builtin:bpe-8192 or builtin:gpt2")
    try:
        return read_regular(path, LARGEST)
    except OSError as error:
        raise _unreadable(path, error) from None


def _table(path: Path, content: bytes) -> dict[str, Any]:
    return regular_files.table_of(content, path, RIGHT_FILE, MOST_VALUES)


def _tokens(table: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(token, id) of each token. The vocabulary is a table, or a list whose indices are the ids; added tokens stand beside it."""
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


def _vocab_size(path: Path, table: dict[str, Any]) -> int:
    """One more than the highest id, which is more than the number of tokens where ids have gaps."""
    highest = max((number for _, number in _tokens(table) if isinstance(number, int)), default=-1)
    if highest < 0:
        raise Mistake(f"{path} holds no tokens → {WAY_OUT}")
    return 1 + highest


def ends_of(tokenizer: Tokenizer, root: Path) -> tuple[int, ...]:
    """The ids at which a text ends: end-of-text, and those that generation_config.json beside a tokenizer.json names."""
    named = _beside(tokenizer, root, GENERATION).get("eos_token_id")
    ids = (named if isinstance(named, list) else [named]) if are_ids(named) else []
    return tuple(dict.fromkeys([tokenizer.end_of_text, *ids]))


def template_of(tokenizer: Tokenizer, root: Path) -> str | None:
    """The chat template beside a tokenizer.json, if there is one."""
    if not is_file(tokenizer.name):
        return None
    template = find_template(path_of(tokenizer.name, root).parent, _beside(tokenizer, root, CONFIG))
    return template if isinstance(template, str) and 0 < len(template) <= LONGEST_TEMPLATE else None


def special_tokens_of(tokenizer: Tokenizer, root: Path) -> dict[str, str]:
    """{"bos_token": "<s>", …}: the special tokens that tokenizer_config.json beside a tokenizer.json names."""
    return _special_tokens(_beside(tokenizer, root, CONFIG))


def special_tokens_in(folder: Path) -> dict[str, str]:
    """`special_tokens_of` a tokenizer whose files lie in `folder`."""
    return _special_tokens(table_in(folder, CONFIG))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: token for name in SPECIAL if (token := token_text(config.get(name)))}


def _beside(tokenizer: Tokenizer, root: Path, name: str) -> dict[str, Any]:
    """The table `name` in the folder of the tokenizer.json; empty if there is none, or the tokenizer is a built-in one."""
    if not is_file(tokenizer.name):
        return {}
    return table_in(path_of(tokenizer.name, root).parent, name)


def table_in(folder: Path, name: str, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The table `name` in a folder; empty if there is none. A Mistake if it is a link that leads out of the folder."""
    path = folder / name
    return read_tokenizer_table(check_inside(path, folder), largest) if path.is_file() else {}


def find_template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The chat template of a folder, unchecked: from its own file, or from tokenizer_config.json, which may hold several by name."""
    path = folder / TEMPLATE
    if path.is_file() and path.stat().st_size <= LONGEST_TEMPLATE:
        return decoded(read_regular(check_inside(path, folder), LONGEST_TEMPLATE), str(path))
    template = config.get("chat_template")
    if isinstance(template, dict):
        return template.get("default")
    if not isinstance(template, list):
        return template
    return next((entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), None)


def are_ids(value: Any) -> bool:
    """Whether a value from a JSON file is a token id, or a list of some."""
    if isinstance(value, list):
        return 0 < len(value) <= 100 and not any(isinstance(entry, list) for entry in value) and all(map(are_ids, value))
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
