"""A tokenizer's files beside a model: taken from another program's, kept in a run's folder, written for transformers to read.

    tokenizer.json          the tokenizers library's
    tokenizer_config.json   which tokens have a meaning
    chat_template.jinja     how a conversation becomes text, where there is one; kept as text
    generation_config.json  ids that begin and end what is generated

Only what is known is taken, value by value: theirs may name classes and code.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.data import tokenizer, tokenizer_file
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import CONFIG, LONGEST_TEMPLATE, read_table
from research.hf_writer import write_table

FILE, TEMPLATE, GENERATION = "tokenizer.json", "chat_template.jinja", "generation_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def take(file: Path, target: Path, length: int, ids: Mapping[str, Any]) -> None:
    """Copies into `target` a tokenizer.json and what lies beside it. `length`: the longest text that the model reads.

    `ids`: bos_token_id and eos_token_id, where no generation_config.json lies beside it.
    """
    if not file.is_file():
        raise Mistake(
            f"{file} is not there → AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes it where you trust the folder, "
            "or name another one: --tokenizer builtin:gpt2, --tokenizer PATH"
        )
    source = file.parent
    told = read_table(source / CONFIG) if (source / CONFIG).is_file() else {}
    backend = tokenizer_file.parsed(file)
    shutil.copyfile(file, target / FILE)
    said = {**ids, **(read_table(source / GENERATION) if (source / GENERATION).is_file() else {})}
    known = {name: value for name, value in said.items() if _are_ids(value)}
    tokens = {name: _known(backend, told.get(name)) or _by_id(backend, known.get(f"{name}_id")) for name in SPECIAL}
    tokens["eos_token"] = tokens["eos_token"] or tokenizer_file.end_of_text(file, read_table(file, tokenizer_file.LARGEST))
    describe(target, tokens, length)
    keep_template(target, _template(source, told))
    keep_ids(target, _ids_of(backend, tokens) | known)


def put(target: Path, backend: Any, tokens: Mapping[str, str | None], template: Any, length: int) -> None:
    """Writes into `target` a tokenizer that lies in no folder: the library's object, its special tokens, its chat template."""
    (target / FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")  # its own save raises bare Exceptions on a full disk
    describe(target, tokens, length)
    keep_template(target, template)
    keep_ids(target, _ids_of(backend, tokens))


def describe(target: Path, tokens: Mapping[str, str | None], length: int) -> None:
    """tokenizer_config.json: transformers takes tokenizer.json as it is."""
    named = {name: tokens[name] for name in SPECIAL if tokens.get(name)}
    rest = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "clean_up_tokenization_spaces": False}
    write_table(target / CONFIG, named | rest)


def keep_template(target: Path, template: Any) -> None:
    """chat_template.jinja, where there is one that is text."""
    if isinstance(template, str) and 0 < len(template) <= LONGEST_TEMPLATE:
        (target / TEMPLATE).write_text(template, encoding="utf-8", errors="replace")


def keep_ids(target: Path, told: Mapping[str, Any]) -> None:
    """generation_config.json: the ids of `told` that are ids."""
    write_table(target / GENERATION, {name: told[name] for name in IDS if _are_ids(told.get(name))})


def write(target: Path, words: Tokenizer, root: Path, length: int) -> dict[str, Any]:
    """Writes a run's tokenizer for transformers; returns the ids that begin and end a text."""
    if tokenizer_file.is_file(words.name):
        take(tokenizer_file.path_of(words.name, root), target, length, {})
    else:
        put(target, words.backend, dict.fromkeys(("bos_token", "eos_token"), tokenizer.END_OF_TEXT), None, length)
    ids = read_table(target / GENERATION)
    return {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id", words.end_of_text)}


def _ids_of(backend: Any, tokens: Mapping[str, str | None]) -> dict[str, int | None]:
    """{"eos_token_id": …} of {"eos_token": …}."""
    return {f"{name}_id": backend.token_to_id(token) for name, token in tokens.items() if token}


def ends_of(words: Tokenizer, root: Path) -> tuple[int, ...]:
    """The ids at which a text ends: those that the generation_config.json beside a tokenizer.json names, and end-of-text."""
    told = _beside(words, root, GENERATION).get("eos_token_id")
    named = told if isinstance(told, list) else [told]
    return tuple(dict.fromkeys([words.end_of_text, *(named if _are_ids(told) else ())]))


def template_of(words: Tokenizer, root: Path) -> str | None:
    """The chat template beside a tokenizer.json, where there is one."""
    if not tokenizer_file.is_file(words.name):
        return None
    found = _template(tokenizer_file.path_of(words.name, root).parent, _beside(words, root, CONFIG))
    return found if isinstance(found, str) and 0 < len(found) <= LONGEST_TEMPLATE else None


def special_tokens_of(words: Tokenizer, root: Path) -> dict[str, str]:
    """{"bos_token": "<s>", …}: those that the tokenizer_config.json beside a tokenizer.json names."""
    told = _beside(words, root, CONFIG)
    return {name: token for name in SPECIAL if (token := tokenizer_file.token(told.get(name)))}


def _beside(words: Tokenizer, root: Path, name: str) -> dict[str, Any]:
    """A table in the folder of a run's tokenizer.json; empty where there is none."""
    if not tokenizer_file.is_file(words.name):
        return {}
    path = tokenizer_file.path_of(words.name, root).with_name(name)
    return read_table(path) if path.is_file() else {}


def _template(source: Path, told: Mapping[str, Any]) -> Any:
    """From its own file, or from tokenizer_config.json, where it may be one of several with names."""
    if (source / TEMPLATE).is_file() and (source / TEMPLATE).stat().st_size <= LONGEST_TEMPLATE:
        return (source / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    found = told.get("chat_template")
    named = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return next((entry.get("template") for entry in named if entry.get("name") == "default"), None if isinstance(found, list) else found)


def _known(backend: Any, value: Any) -> str | None:
    """The token that tokenizer_config.json names, if it is one of the tokenizer's: transformers would add another with a new id."""
    found = tokenizer_file.token(value)
    return found if found is not None and backend.token_to_id(found) is not None else None


def _by_id(backend: Any, ids: Any) -> str | None:
    """The token that an id, or the first of several, is of; None where there is none."""
    first = ids[0] if isinstance(ids, list) else ids
    return None if first is None else backend.id_to_token(first)


def _are_ids(value: Any) -> bool:
    """One, or a list of some."""
    if isinstance(value, list):
        return 0 < len(value) <= 100 and not any(isinstance(entry, list) for entry in value) and all(map(_are_ids, value))
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
