"""The tokenizer in a GGUF file as a tokenizer.json: transformers' conversion, and what it leaves open."""

from typing import Any

from parallel.errors import Mistake
from research.gguf_reader import File

KEYS = {
    "tokenizer.ggml.model": "tokenizer_type",
    "tokenizer.ggml.pre": "pre_tokenizer_type",
    "tokenizer.ggml.tokens": "tokens",
    "tokenizer.ggml.scores": "scores",
    "tokenizer.ggml.token_type": "token_type",
    "tokenizer.ggml.merges": "merges",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.add_space_prefix": "add_prefix_space",
}
"""A field -> what transformers' conversion calls it."""
SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Byte-level with GPT-2's pattern, but every digit is a token of its own."""
LLAMA_3 = ("llama3", "llama-v3", "llama-bpe")
"""A word that is a token is never put together from merges."""
AS_GPT_2 = ("gpt-2", "phi-2", "olmo", "dolma", "gpt-neox", None)
WAY_OUT = "name the model's tokenizer.json: --tokenizer PATH"


def convert(file: File) -> tuple[Any, dict[str, Any]]:
    """(the tokenizers library's tokenizer, {"eos_token": …, "chat_template": …}) of a GGUF file."""
    told = {name: file.metadata.get(key, file.array(key)) for key, name in KEYS.items()}
    told = {name: value for name, value in told.items() if value is not None}
    kind, pre, tokens = told.get("tokenizer_type"), told.get("pre_tokenizer_type"), told.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise Mistake(f"{file.path}: tokenizer.ggml.model = {kind!r:.40} has no counterpart here, only 'gpt2' and 'llama' → {WAY_OUT}")
    try:
        backend = _converted(told, kind, pre)
    except Mistake:
        raise
    except Exception as error:
        raise Mistake(f"{file.path} holds no whole tokenizer ({str(error)[:100]!r}) → {WAY_OUT}") from None
    config = {name: _token(tokens, file.metadata.get(key)) for name, key in SPECIAL.items()}
    if file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and config["bos_token"]:
        _begin_with(backend, config["bos_token"])
    return backend, {**config, "chat_template": file.metadata.get("tokenizer.chat_template")}


def _converted(told: dict[str, Any], kind: str, pre: Any) -> Any:
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if kind == "gpt2" and pre not in (*DIGIT_BY_DIGIT, *AS_GPT_2, *GGUF_PRE_TOKENIZER_SPLITS):
        raise Mistake(f"tokenizer.ggml.pre = {pre!r:.40}, a way to cut text, has no counterpart here → {WAY_OUT}")
    backend, _ = convert_gguf_tokenizer("llama", told)
    if kind == "gpt2" and pre in DIGIT_BY_DIGIT:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "gpt2" and pre in LLAMA_3:
        backend.model.ignore_merges = True
    return backend


def _token(tokens: list[Any], number: Any) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) and isinstance(tokens[number], str) else None


def _begin_with(backend: Any, token: str) -> None:
    """Whoever asks for special tokens gets `token` first, as llama.cpp adds it."""
    from tokenizers import processors

    identifier = backend.token_to_id(token)
    if identifier is not None:
        begin = {"id": "begin", "ids": [identifier], "tokens": [token]}
        pair = ["begin", "$A", "begin:1", "$B:1"]
        backend.post_processor = processors.TemplateProcessing(single=["begin", "$A"], pair=pair, special_tokens=[begin])
