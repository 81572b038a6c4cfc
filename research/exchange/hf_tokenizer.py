"""Copies and writes the tokenizer files beside a model, in the layout that transformers reads.

    tokenizer.json          the tokenizers library's own file
    tokenizer_config.json   the special tokens
    chat_template.jinja     the chat template, if there is one, as text
    generation_config.json  the ids that begin and end a generated text

The files may come from a stranger and may name classes and code, so only known keys are copied, and each value is checked.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import write_json
from research.data import tokenizer_file
from research.data.tokenizer import END_OF_TEXT, Tokenizer
from research.data.tokenizer_file import CONFIG, FILE, GENERATION, LONGEST_TEMPLATE, SPECIAL, TEMPLATE, are_ids, find_template, read_table

ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(file: Path, target: Path, length: int, default_ids: Mapping[str, Any]) -> None:
    """Copies a tokenizer.json, and what is known of the files beside it, into `target`.

    `length` is the longest text that the model reads, in tokens. `default_ids` holds bos_token_id and eos_token_id, which
    generation_config.json overrides if there is one.
    """
    if not file.is_file():
        raise Mistake(
            f"{file} is not there → AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes it where you trust the folder, "
            "or name another one: --tokenizer builtin:gpt2, --tokenizer PATH"
        )
    source = file.parent
    config = read_table(source / CONFIG) if (source / CONFIG).is_file() else {}
    backend = tokenizer_file.parsed(file)
    shutil.copyfile(file, target / FILE)
    generation = read_table(source / GENERATION) if (source / GENERATION).is_file() else {}
    ids = {name: value for name, value in {**default_ids, **generation}.items() if are_ids(value)}

    # a special token is what tokenizer_config.json names, or else the token of its id, or of the first of several ids
    tokens: dict[str, str | None] = {}
    for name in SPECIAL:
        token = tokenizer_file.token_text(config.get(name))
        if token is None or backend.token_to_id(token) is None:  # transformers would add an unknown token with a new id
            named = ids.get(f"{name}_id")
            first = named[0] if isinstance(named, list) else named
            token = None if first is None else backend.id_to_token(first)
        tokens[name] = token
    tokens["eos_token"] = tokens["eos_token"] or tokenizer_file.end_of_text(file, read_table(file, tokenizer_file.LARGEST))
    _write_settings(target, backend, tokens, ids, find_template(source, config), length)


def save_tokenizer(target: Path, backend: Any, tokens: Mapping[str, str | None], template: Any, length: int) -> None:
    """Writes a tokenizer that is not in a folder: the library's object, its special tokens and its chat template."""
    (target / FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")  # backend.save raises bare Exceptions on a full disk
    _write_settings(target, backend, tokens, {}, template, length)


def export_tokenizer(target: Path, tokenizer: Tokenizer, root: Path, length: int) -> dict[str, Any]:
    """Writes a run's tokenizer for transformers and returns its bos_token_id and eos_token_id."""
    if tokenizer_file.is_file(tokenizer.name):
        copy_tokenizer(tokenizer_file.path_of(tokenizer.name, root), target, length, {})
    else:
        save_tokenizer(target, tokenizer.backend, dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT), None, length)
    ids = read_table(target / GENERATION)
    return {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id", tokenizer.end_of_text)}


def _write_settings(
    target: Path, backend: Any, tokens: Mapping[str, str | None], ids: Mapping[str, Any], template: Any, length: int
) -> None:
    """Writes the files beside tokenizer.json. `ids` go before the ids of `tokens`."""
    config = {name: tokens[name] for name in SPECIAL if tokens.get(name)}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "clean_up_tokenization_spaces": False}
    write_json(target / CONFIG, config | fixed)  # transformers then uses tokenizer.json as it is
    if isinstance(template, str) and 0 < len(template) <= LONGEST_TEMPLATE:
        (target / TEMPLATE).write_text(template, encoding="utf-8", errors="replace")
    all_ids = {f"{name}_id": backend.token_to_id(token) for name, token in tokens.items() if token} | dict(ids)
    write_json(target / GENERATION, {name: all_ids[name] for name in ID_KEYS if are_ids(all_ids.get(name))})
