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
from research.data.tokenizer_file import CONFIG, FILE, GENERATION, LONGEST_TEMPLATE, SPECIAL, TEMPLATE, are_ids, find_template, read_table
from research.exchange.hf_writer import write_table

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
    known = {name: value for name, value in said.items() if are_ids(value)}
    tokens = {name: _known(backend, told.get(name)) or _by_id(backend, known.get(f"{name}_id")) for name in SPECIAL}
    tokens["eos_token"] = tokens["eos_token"] or tokenizer_file.end_of_text(file, read_table(file, tokenizer_file.LARGEST))
    describe(target, tokens, length)
    keep_template(target, find_template(source, told))
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
    write_table(target / GENERATION, {name: told[name] for name in IDS if are_ids(told.get(name))})


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


def _known(backend: Any, value: Any) -> str | None:
    """The token that tokenizer_config.json names, if it is one of the tokenizer's: transformers would add another with a new id."""
    found = tokenizer_file.token_text(value)
    return found if found is not None and backend.token_to_id(found) is not None else None


def _by_id(backend: Any, ids: Any) -> str | None:
    """The token that an id, or the first of several, is of; None where there is none."""
    first = ids[0] if isinstance(ids, list) else ids
    return None if first is None else backend.id_to_token(first)
