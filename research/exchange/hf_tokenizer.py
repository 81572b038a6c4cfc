"""Copies and writes the tokenizer files beside a model, in the layout that transformers reads.

    tokenizer.json          the tokenizers library's own file
    tokenizer_config.json   the special tokens
    chat_template.jinja     the chat template, if there is one, as text
    generation_config.json  the ids that begin and end a generated text

The files may come from a stranger and may name classes and code, so only known keys are copied, and each value is checked.
"""

import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from parallel.errors import Mistake, listed_up_to
from parallel.files import write_json
from research.data import tokenizer_file
from research.data.tokenizer import END_OF_TEXT, Tokenizer
from research.data.tokenizer_file import (
    CONFIG,
    FILE,
    GENERATION,
    LONGEST_TEMPLATE,
    SPECIAL,
    TEMPLATE,
    are_ids,
    find_template,
    read_tokenizer_table,
    table_in,
)

ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
OLDER_CONFIG, OLDER_TEMPLATE, TEMPLATES = "special_tokens_map.json", "chat_template.json", "additional_chat_templates"
READ = ("config.json", FILE, CONFIG, OLDER_CONFIG, "added_tokens.json")
"""The files that transformers makes a tokenizer from."""
MOST_NAMES, MOST_ENTRIES = 8, 10_000
"""The most names in one sentence, and the most entries of a folder that are looked at."""


def copy_tokenizer(file: Path, target: Path, length: int, default_ids: Mapping[str, Any], rows: int | None = None) -> list[str]:
    """Copies a tokenizer.json, and what is known of the files beside it, into `target`. Returns a sentence for what is left out.

    `length` is the longest text that the model reads, in tokens. `default_ids` holds bos_token_id and eos_token_id, which
    generation_config.json overrides if there is one. `rows`: the height of the model's table; added tokens beyond it are left out.
    """
    if not file.is_file():
        raise Mistake(
            f"{file} is not there → AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes it where you trust the folder, "
            "or name another one: --tokenizer builtin:gpt2, --tokenizer PATH"
        )
    source = file.parent
    config = named_tokens(source)
    tokenizer_file.parsed(file)  # raises a Mistake that names the file
    shutil.copyfile(file, target / FILE)
    left_out = [] if rows is None else leave_out_tokens(target / FILE, rows)
    backend = tokenizer_file.parsed(target / FILE)

    generation = table_in(source, GENERATION)
    given = {name: value for name, value in {**default_ids, **generation}.items() if name in ID_KEYS and value is not None}
    ids = {name: value for name, value in given.items() if are_ids(value) and (rows is None or _largest(value) < rows)}
    left_out += [f"{name} = {value!r:.60}: no ids of this model" for name, value in given.items() if name not in ids]

    # a special token is what tokenizer_config.json names, or else the token of its id, or of the first of several ids
    tokens: dict[str, str | None] = {}
    for name in SPECIAL:
        token = tokenizer_file.token_text(config.get(name))
        if token is None or backend.token_to_id(token) is None:  # transformers would add an unknown token with a new id
            if config.get(name):
                left_out.append(f"{CONFIG}: {name} = {config[name]!r:.60}: no token of {FILE} that this model has a row for")
            named = ids.get(f"{name}_id")
            first = named[0] if isinstance(named, list) else named
            token = None if first is None else backend.id_to_token(first)
        tokens[name] = token
    tokens["eos_token"] = tokens["eos_token"] or tokenizer_file.end_of_text(
        file, read_tokenizer_table(target / FILE, tokenizer_file.LARGEST)
    )
    template = find_template(source, config)
    _write_settings(target, backend, tokens, ids, template, length)
    return left_out + _templates_left_out(source, config, template)


def named_tokens(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what special_tokens_map.json names where transformers reads that file."""
    config, older = (table_in(folder, name) for name in (CONFIG, OLDER_CONFIG))
    return config if "added_tokens_decoder" in config else {**config, **older}


def leave_out_tokens(file: Path, rows: int) -> list[str]:
    """Takes added tokens whose ids are `rows` or more out of a tokenizer.json, and returns a sentence about them.

    Such a token, a `[PAD]` as a rule, has no row in the model's table. transformers fails where it occurs in a text.
    """
    table = read_tokenizer_table(file, tokenizer_file.LARGEST)
    added: list[Any] = table.get("added_tokens") or []
    beyond = [entry for entry in added if _is_beyond(entry, rows)]
    if not beyond:
        return []
    write_json(file, table | {"added_tokens": [entry for entry in added if not _is_beyond(entry, rows)]})
    names = listed_up_to((f"{entry.get('content')!r:.40} ({entry['id']})" for entry in beyond), MOST_NAMES)
    return [f"{FILE}: {names}: the model's table has no row for {'it' if len(beyond) == 1 else 'them'}, only {rows}"]


def _is_beyond(entry: Any, rows: int) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), int) and entry["id"] >= rows


def _largest(ids: Any) -> int:
    return max(ids) if isinstance(ids, list) else ids


def _templates_left_out(folder: Path, config: Mapping[str, Any], template: Any) -> list[str]:
    """A sentence for each chat template that is not taken: one that cannot be, and those beside the default."""
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {str(entry.get("name")): entry.get("template") for entry in named if isinstance(entry, dict)}
    names = sorted(named) if isinstance(named, dict) else []
    if (folder / TEMPLATES).is_dir():
        names += sorted(path.stem for path in islice((folder / TEMPLATES).glob("*.jinja"), MOST_ENTRIES))
    others = listed_up_to((repr(name)[:40] for name in names if name != "default"), MOST_NAMES)
    file = folder / TEMPLATE
    if file.is_file() and file.stat().st_size > LONGEST_TEMPLATE:
        return [f"{TEMPLATE}: {file.stat().st_size} bytes, more than {LONGEST_TEMPLATE}: not taken"]
    if is_template(template):
        return [f"chat templates other than the default: {others}"] if others else []
    if isinstance(template, str) and template:
        return [f"{CONFIG}: chat_template has {len(template)} characters, more than {LONGEST_TEMPLATE}: not taken"]
    if others:
        return [f"chat templates without one called 'default': {others}: none is taken → serve RUN --chat_template FILE"]
    if template or (named and not isinstance(named, dict)):
        return [f"{CONFIG}: chat_template is no text: not taken"]
    if (folder / OLDER_TEMPLATE).is_file():
        return [f"{OLDER_TEMPLATE}: a processor's chat template: not taken → serve RUN --chat_template FILE"]
    return []


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
    ids = read_tokenizer_table(target / GENERATION)
    return {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id", tokenizer.end_of_text)}


def is_template(template: Any) -> bool:
    """Whether a value is a chat template that can be taken."""
    return isinstance(template, str) and 0 < len(template) <= LONGEST_TEMPLATE


def _write_settings(
    target: Path, backend: Any, tokens: Mapping[str, str | None], ids: Mapping[str, Any], template: Any, length: int
) -> None:
    """Writes the files beside tokenizer.json. `ids` go before the ids of `tokens`."""
    config = {name: tokens[name] for name in SPECIAL if tokens.get(name)}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "clean_up_tokenization_spaces": False}
    write_json(target / CONFIG, config | fixed)  # transformers then uses tokenizer.json as it is
    if is_template(template):
        (target / TEMPLATE).write_text(template, encoding="utf-8", errors="replace")
    all_ids = {f"{name}_id": backend.token_to_id(token) for name, token in tokens.items() if token} | dict(ids)
    write_json(target / GENERATION, {name: all_ids[name] for name in ID_KEYS if are_ids(all_ids.get(name))})
