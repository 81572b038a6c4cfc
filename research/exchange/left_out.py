"""Lists what a Hugging Face folder or a GGUF file holds and an import does not take: a sentence for each, if it has an effect."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from models.conversion.read_config import DROPOUT_KEYS, unread_keys
from parallel.errors import listed_up_to
from research.data.tokenizer_file import CONFIG, FILE, GENERATION, LARGEST, LONGEST_TEMPLATE, SPECIAL, TEMPLATE, table_in, token_text
from research.exchange.hf_reader import CONFIG as MODEL_CONFIG
from research.exchange.hf_tokenizer import MOST_ENTRIES, MOST_NAMES, TEMPLATES, is_template

QUIET_TOKENIZER_KEYS = {
    "tokenizer_class", "tokenizer_type", "model_max_length", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file",
    "merges_file", "backend", "is_local", "local_files_only", "use_fast", "from_slow", "legacy", "legacy_behaviour", "padding_side",
    "truncation_side", "truncation_strategy", "max_length", "stride", "pad_token_type_id", "pad_to_multiple_of", "processor_class",
    "errors", "sp_model_kwargs", "chat_template", "added_tokens_decoder", "split_special_tokens", "add_prefix_space", "add_bos_token",
    "add_eos_token", "use_default_system_prompt", "model_input_names", "trust_remote_code", "device_map", "_commit_hash",
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", *SPECIAL,
}  # fmt: skip
"""Keys of tokenizer_config.json that are taken, that the comparison of ids covers, or that have no effect on encoding text."""
QUIET_GENERATION_KEYS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config", "transformers_version", "do_sample", "use_cache", "max_length",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "num_return_sequences", "decoder_start_token_id",
}  # fmt: skip
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""Keys of generation_config.json that are options of `generate`."""
NO_FILES_OF_A_MODEL = {"README.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes", ".gitignore", "certificate.json"}
REPEATED = {"vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"}
"""Files that repeat what tokenizer.json holds. special_tokens_map.json is read."""
QUIET_METADATA = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "expert_count", "expert_used_count",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "add_space_prefix", "add_bos_token",
}  # fmt: skip
"""What is read of a GGUF file's metadata, without the name of its architecture or `tokenizer.ggml.` in front."""


def of_settings(config: Mapping[str, Any]) -> list[str]:
    """What of config.json is left out."""
    sentences = []
    dropouts = [f"{key} = {config[key]:g}" for key in DROPOUT_KEYS if isinstance(config.get(key), (int, float)) and config[key]]
    if dropouts:
        sentences.append(f"{MODEL_CONFIG}: {', '.join(dropouts)}: the model is trained further without dropout")
    window, length = config.get("sliding_window"), config.get("max_position_embeddings")
    if window and (config.get("model_type") == "mistral" or config.get("use_sliding_window")):
        sentences.append(f"{MODEL_CONFIG}: sliding_window = {window}: not kept, because no text of {length} tokens is longer")
    if config.get("model_type") == "t5":
        sentences.append(f"{MODEL_CONFIG}: one table of relative positions for all layers of a stack: each layer gets a copy of its own")
    if code := config.get("auto_map"):
        sentences.append(f"{MODEL_CONFIG}: auto_map names programs ({_short(code)}), which are not run")
    if unread := [f"{key} = {_short(config[key])}" for key in unread_keys(config)]:
        sentences.append(f"{MODEL_CONFIG}: {listed_up_to(unread, MOST_NAMES)}: not read")
    return sentences


def of_tokenizer(folder: Path, length: int) -> list[str]:
    """What of tokenizer.json and tokenizer_config.json in `folder` is left out. `length`: the longest text that the model reads."""
    sentences, config = [], table_in(folder, CONFIG)
    if config.get("clean_up_tokenization_spaces") is True:
        sentences.append(f"{CONFIG}: clean_up_tokenization_spaces = true: here the spaces of a decoded text stay as they are")
    if config.get("auto_map"):
        sentences.append(f"{CONFIG}: auto_map names programs ({_short(config['auto_map'])}), which are not run")
    limit = config.get("model_max_length")
    if isinstance(limit, int) and 0 < limit < length:
        sentences.append(f"{CONFIG}: model_max_length = {limit}: here a text may have {length} tokens, as {MODEL_CONFIG} says")
    if unread := [f"{key} = {_short(config[key])}" for key in config.keys() - QUIET_TOKENIZER_KEYS - {"auto_map"} if config[key]]:
        sentences.append(f"{CONFIG}: {listed_up_to(sorted(unread), MOST_NAMES)}: not kept; the tokens themselves stay")
    table = table_in(folder, FILE, LARGEST)
    if missing := sorted(_added_tokens(config) - _tokens(table)):
        names = listed_up_to([repr(name) for name in missing], MOST_NAMES)
        sentences.append(f"{CONFIG}: added_tokens_decoder has {names}, which {FILE} lacks: not added")
    if off := [f"{name} to {_short(table[name])}" for name in ("truncation", "padding") if table.get(name)]:
        sentences.append(f"{FILE}: {listed_up_to(off, MOST_NAMES)}: switched off")
    return sentences


def of_generation(folder: Path) -> list[str]:
    """What of generation_config.json is left out: all but the ids at which a text begins and ends."""
    config = table_in(folder, GENERATION)
    given = {key: value for key, value in config.items() if value not in (None, False, [], {}) and key not in QUIET_GENERATION_KEYS}
    sentences = []
    if options := [f"--{key} {given[key]}" for key in OPTIONS if isinstance(given.get(key), (int, float))]:
        sentences.append(f"{GENERATION}: not defaults here → generate … {' '.join(options)}")
    if unread := [f"{key} = {_short(value)}" for key, value in given.items() if key not in OPTIONS]:
        sentences.append(f"{GENERATION}: {listed_up_to(unread, MOST_NAMES)}: without a counterpart")
    return sentences


def of_files(folder: Path, read: Iterable[str]) -> list[str]:
    """The files and folders beside the model that were not opened. `read`: the names of those that were."""
    known = {*read, *NO_FILES_OF_A_MODEL, *REPEATED, FILE, CONFIG, GENERATION, TEMPLATE, TEMPLATES, ".cache", ".git"}
    entries = islice(folder.iterdir(), MOST_ENTRIES)
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in entries if path.name not in known)
    sentences = []
    if adapters := [name for name in names if name.startswith("adapter_")]:
        found = listed_up_to(adapters, MOST_NAMES)
        sentences.append(f"{found}: an adapter is not merged into the model → peft's merge_and_unload, then import")
    if others := [name for name in names if not name.startswith("adapter_")]:
        sentences.append(f"not opened: {listed_up_to(others, MOST_NAMES)}")
    return sentences


def of_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """What of a GGUF file's metadata is left out, beyond descriptions (`general.…`)."""
    sentences, template = [], metadata.get("tokenizer.chat_template")
    if template and not is_template(template):
        sentences.append(f"tokenizer.chat_template has {len(str(template))} characters, more than {LONGEST_TEMPLATE}: not taken")
    prefixes = (f"{metadata.get('general.architecture')}.", "tokenizer.ggml.", "tokenizer.chat_template.")
    for key in sorted(key for key, value in metadata.items() if key.startswith(prefixes) and value not in (None, False, "")):
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        if key.removeprefix(prefix) not in QUIET_METADATA:
            sentences.append(f"{key} = {_short(metadata[key])}: not read")
    return sentences


def _added_tokens(config: Mapping[str, Any]) -> set[str]:
    """The tokens that tokenizer_config.json adds to those of tokenizer.json."""
    added = config.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else ()
    return {text for entry in entries if (text := token_text(entry))}


def _tokens(table: Mapping[str, Any]) -> set[str]:
    """The tokens of a tokenizer.json. A vocabulary is a table, or a list of pairs."""
    model, added = table.get("model"), table.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    names = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary or ()]
    names += [entry.get("content") for entry in (added if isinstance(added, list) else []) if isinstance(entry, dict)]
    return {name for name in names if isinstance(name, str)}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"
