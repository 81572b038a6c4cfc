"""A Llama in llama.cpp's GGUF format, read tensor by tensor and dequantised on the way. It may come from a stranger.

The `gguf` package (llama.cpp's own, pure Python) maps the file into memory and knows every packing.
"""
# MERGED-DOC """The tokenizer in a GGUF file as a tokenizer.json: transformers' conversion, and what it leaves open."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.conversion import gguf as names
from models.conversion.read_config import settings
from parallel.errors import Mistake
from research.exchange.source import finite, regular

WAY_OUT = "take a whole GGUF file of a Llama"


class GGUFFile:
    """A GGUF file, opened: a Source. `metadata` are its fields; arrays, which may be long, come from `array` alone."""

    def __init__(self, path: Path) -> None:
        self.path, self.family = regular(path), names.FAMILY
        try:
            self._reader = _library().GGUFReader(str(path))
            self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}
            self.shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
            self.metadata = {name: field.contents() for name, field in self._reader.fields.items() if not _is_array(field)}
            tokens = self._reader.fields.get("tokenizer.ggml.tokens")
        except Mistake:
            raise
        except Exception as error:  # its reader trusts what it reads: anything may be raised
            raise Mistake(f"{path} is not a whole GGUF file ({type(error).__name__}: {str(error)[:100]!r}) → {WAY_OUT}") from None
        if (count := self.metadata.get("split.count", 1)) != 1:
            raise Mistake(f"{path} is one of {count!r:.20} files → join them first: llama-gguf-split --merge FIRST WHOLE")
        factors = self.read(names.ROTARY_FACTORS) if names.ROTARY_FACTORS in self.shapes else None
        told = {"llama.vocab_size": len(tokens.data) if tokens else None} | self.metadata
        self.config = names.config(told, self.shapes, factors)
        self.shapes.pop(names.ROTARY_FACTORS, None)
        settings(self.config)

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *exception: object) -> None:
        """The map is let go with the last tensor that was read from it."""

    def array(self, name: str) -> list[Any] | None:
        """The values of a field that is an array; None where it is not there."""
        field = self._reader.fields.get(name)
        if field is None or not _is_array(field):
            return None
        try:
            return field.contents()
        except Exception as error:
            raise Mistake(f"{self.path}: {name} cannot be read ({str(error)[:100]!r}) → {WAY_OUT}") from None

    def check(self, wanted: Iterable[str]) -> None:
        """See Source: every packing that is met is tried on a row."""
        for tensor in {self._tensors[name].tensor_type: self._tensors[name] for name in wanted}.values():
            self._unpacked(tensor, tensor.data[:1])

    def read(self, name: str) -> Tensor:
        """See Source."""
        tensor = self._tensors[name]
        values = self._unpacked(tensor, tensor.data)
        if values.numel() != tensor.n_elements:
            raise Mistake(f"{self.path}: {name:.200} has {values.numel()} elements, not {tensor.n_elements} → {WAY_OUT}")
        return finite(values.view(self.shapes[name]), name)

    def files(self) -> list[Path]:
        """See Source."""
        return [self.path]

    def _unpacked(self, tensor: Any, data: Any) -> Tensor:
        """fp32, a copy."""
        try:
            return torch.from_numpy(_library().dequantize(data, tensor.tensor_type).astype("float32", copy=True))
        except Exception as error:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            told = f"{self.path}: {tensor.name!s:.200} is packed as {kind}, which cannot be unpacked ({str(error)[:80]!r})"
            raise Mistake(f"{told} → take a file with another packing, such as Q8_0") from None


def _library() -> Any:
    """The gguf package, which is needed for nothing else."""
    try:
        import gguf
    except ImportError:
        raise Mistake("reading a .gguf file takes the gguf package → pip install -r requirements.txt") from None
    return gguf


def _is_array(field: Any) -> bool:
    return bool(field.types) and field.types[0] == _library().GGUFValueType.ARRAY


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
TOKENIZER_WAY_OUT = "name the model's tokenizer.json: --tokenizer PATH"


def convert_tokenizer(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """(the tokenizers library's tokenizer, {"eos_token": …, "chat_template": …}) of a GGUF file."""
    told = {name: file.metadata.get(key, file.array(key)) for key, name in KEYS.items()}
    told = {name: value for name, value in told.items() if value is not None}
    kind, pre, tokens = told.get("tokenizer_type"), told.get("pre_tokenizer_type"), told.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise Mistake(
            f"{file.path}: tokenizer.ggml.model = {kind!r:.40} has no counterpart here, only 'gpt2' and 'llama' → {TOKENIZER_WAY_OUT}"
        )
    try:
        backend = _converted(told, kind, pre)
    except Mistake:
        raise
    except Exception as error:
        raise Mistake(f"{file.path} holds no whole tokenizer ({str(error)[:100]!r}) → {TOKENIZER_WAY_OUT}") from None
    config = {name: _token(tokens, file.metadata.get(key)) for name, key in SPECIAL.items()}
    if file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and config["bos_token"]:
        _begin_with(backend, config["bos_token"])
    return backend, {**config, "chat_template": file.metadata.get("tokenizer.chat_template")}


def _converted(told: dict[str, Any], kind: str, pre: Any) -> Any:
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if kind == "gpt2" and pre not in (*DIGIT_BY_DIGIT, *AS_GPT_2, *GGUF_PRE_TOKENIZER_SPLITS):
        raise Mistake(f"tokenizer.ggml.pre = {pre!r:.40}, a way to cut text, has no counterpart here → {TOKENIZER_WAY_OUT}")
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
