"""Reads a Llama, Qwen2 or Qwen3 from a GGUF file (llama.cpp's format): settings, tensors dequantised one by one, and the tokenizer.

The `gguf` package (llama.cpp's own, pure Python) knows every quantisation. The file may come from a stranger: gguf_header.py checks what
it says of itself before anything is allocated by it.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.conversion import gguf as names
from models.conversion.read_config import settings
from parallel.errors import Mistake
from research.data.tokenizer import library_error
from research.exchange.gguf_header import Header, TensorInfo
from research.exchange.source import check_finite

WAY_OUT = "take a whole GGUF file"
MOST_FACTORS = 2**16
"""The most elements of rope_freqs.weight: half of a head's width."""
PLAIN = {0: "<f4", 1: "<f2", 28: "<f8"}
"""ggml's number of F32, F16 and F64 -> the type of their elements."""
CONVERSION_NAMES = {
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
"""Metadata field -> its name in transformers' conversion."""
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Pre-tokenizers that are GPT-2's, except that every digit is a token of its own."""
LLAMA_3 = ("llama3", "llama-v3", "llama-bpe")
"""Pre-tokenizers of Llama 3: a word that is in the vocabulary is not built from merges."""
LIKE_GPT_2 = ("gpt-2", "phi-2", "olmo", "dolma", "gpt-neox", None)
TOKENIZER_WAY_OUT = "name the model's tokenizer.json: --tokenizer PATH"


class GGUFFile:
    """A Source that reads a GGUF file. `metadata` holds its fields without arrays, which may be long: `array` reads one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._header = Header(path)
            self._sizes = {name: _stored_size(name, tensor) for name, tensor in self._header.tensors.items()}
            self._check_places()
        except OSError as error:
            raise Mistake(f"{path} cannot be read ({error.strerror or error}) → {WAY_OUT}") from None
        except ValueError as error:
            raise Mistake(f"{path} is not a whole GGUF file ({str(error)[:200]}) → {WAY_OUT}") from None
        self.metadata = self._header.metadata
        self.shapes = {name: tensor.shape for name, tensor in self._header.tensors.items()}
        if (count := self.metadata.get("split.count", 1)) != 1:
            raise Mistake(f"{path} is one of {count!r:.20} files → join them first: llama-gguf-split --merge FIRST WHOLE")
        factors = self._rotary_factors()
        tokens = self._header.arrays.get("tokenizer.ggml.tokens")
        vocab_size = {f"{self.metadata.get('general.architecture')}.vocab_size": tokens.count if tokens else None}
        self.config = names.config(vocab_size | self.metadata, self.shapes, factors)
        self.family = names.GGUF_FAMILIES[self.config["model_type"]]
        self.shapes.pop(names.ROTARY_FACTORS, None)
        settings(self.config)

    @property
    def header_size(self) -> int:
        """The bytes in front of the tensors."""
        return self._header.begin

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *exception: object) -> None:
        """Does nothing: the memory map of a tensor is released with it."""

    def array(self, name: str) -> list[Any] | None:
        """Returns the values of an array field, or None if there is no such array."""
        try:
            return self._header.elements(name)
        except ValueError as error:
            raise Mistake(f"{self.path}: {name} cannot be read ({str(error)[:100]!r}) → {WAY_OUT}") from None

    def check(self, wanted: Iterable[str]) -> None:
        """Raises a Mistake if the quantisation of one of these tensors is not supported; tries each type on one row."""
        for name in {self._header.tensors[name].packing: name for name in wanted}.values():
            self._dequantised(name, self._stored(name)[:1])

    def read(self, name: str) -> Tensor:
        values, shape = self._dequantised(name, self._stored(name)), self._header.tensors[name].shape
        if values.numel() != prod(shape):
            raise Mistake(f"{self.path}: {name:.200} has {values.numel()} elements, not {prod(shape)} → {WAY_OUT}")
        return check_finite(values.view(shape), name)

    def files(self) -> list[Path]:
        return [self.path]

    def _check_places(self) -> None:
        """Requires that every tensor lies within the file, and no two on the same bytes."""
        end, last = 0, ""
        for name, tensor in sorted(self._header.tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise ValueError(f"{name!r:.80} begins within {last!r:.80}")
            end, last = tensor.offset + self._sizes[name], name
            if self._header.begin + end > self._header.size:
                raise ValueError(f"{name!r:.80} ends at {self._header.begin + end:,}, the file at {self._header.size:,}")

    def _rotary_factors(self) -> Tensor | None:
        """The tensor that the rotary frequencies are divided by, if there is one. It is read before the model's shapes are known."""
        if names.ROTARY_FACTORS not in self.shapes:
            return None
        if prod(self.shapes[names.ROTARY_FACTORS]) > MOST_FACTORS:
            raise Mistake(f"{self.path}: {names.ROTARY_FACTORS} has more than {MOST_FACTORS} elements → {WAY_OUT}")
        return self.read(names.ROTARY_FACTORS)

    def _stored(self, name: str) -> np.ndarray:
        """A tensor as it is stored, mapped into memory: '… columns' of a plain type, or '… bytes' of one that is packed."""
        tensor = self._header.tensors[name]
        raw = np.memmap(self.path, np.uint8, "r", self._header.begin + tensor.offset, (self._sizes[name],))
        plain = PLAIN.get(tensor.packing)
        return raw.view(plain).reshape(tensor.shape) if plain else raw.reshape(*tensor.shape[:-1], -1)

    def _dequantised(self, name: str, stored: np.ndarray) -> Tensor:
        """The values in fp32, copied out of the memory map."""
        packing = _library().GGMLQuantizationType(self._header.tensors[name].packing)
        try:
            return torch.from_numpy(_library().dequantize(stored, packing).astype("float32", copy=True))
        except Exception as error:
            problem = f"{self.path}: {name:.200} is packed as {packing.name}, which cannot be unpacked ({str(error)[:80]!r})"
            raise Mistake(f"{problem} → take a file with another packing, such as Q8_0") from None


def _library() -> Any:
    """Imports the gguf package, which only this module needs."""
    try:
        import gguf
    except ImportError:
        raise Mistake("reading a .gguf file takes the gguf package → pip install -r requirements.txt") from None
    return gguf


def _stored_size(name: str, tensor: TensorInfo) -> int:
    """The bytes of a tensor in the file. Raises a ValueError for a packing that there is none of, or that does not fit its rows."""
    library = _library()
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(tensor.packing)]
    except (ValueError, KeyError):
        raise ValueError(f"{name!r:.80} has the unknown packing {tensor.packing}") from None
    if tensor.shape[-1] % block:
        raise ValueError(f"{name!r:.80} has rows of {tensor.shape[-1]}, which are no blocks of {block}")
    return prod(tensor.shape) // block * size


def convert_tokenizer(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """Converts the tokenizer in a GGUF file, with transformers' conversion and what it leaves out.

    Returns (the tokenizers library's tokenizer, {"eos_token": …, "chat_template": …}).
    """
    fields = {name: file.metadata.get(key, file.array(key)) for key, name in CONVERSION_NAMES.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    model, tokens = fields.get("tokenizer_type"), fields.get("tokens")
    if model not in ("gpt2", "llama") or not isinstance(tokens, list):
        problem = f"tokenizer.ggml.model = {model!r:.40} has no counterpart here, only 'gpt2' and 'llama'"
        raise Mistake(f"{file.path}: {problem} → {TOKENIZER_WAY_OUT}")
    try:
        backend = _convert_backend(fields)
    except BaseException as error:
        raise library_error(error, f"{file.path} holds no whole tokenizer", TOKENIZER_WAY_OUT) from None

    special: dict[str, Any] = {}
    for name, key in SPECIAL_TOKENS.items():
        number = file.metadata.get(key)
        token = tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
        special[name] = token if isinstance(token, str) else None
    if file.metadata.get("tokenizer.ggml.add_bos_token", model == "llama") and special["bos_token"]:
        _prepend_token(backend, special["bos_token"])
    return backend, {**special, "chat_template": file.metadata.get("tokenizer.chat_template")}


def _convert_backend(fields: dict[str, Any]) -> Any:
    """The tokenizers library's tokenizer. Corrects what transformers' conversion does not do for some pre-tokenizers."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    byte_level, pre_tokenizer = fields["tokenizer_type"] == "gpt2", fields.get("pre_tokenizer_type")
    if byte_level and pre_tokenizer not in (*SINGLE_DIGITS, *LIKE_GPT_2, *GGUF_PRE_TOKENIZER_SPLITS):
        problem = f"tokenizer.ggml.pre = {pre_tokenizer!r:.40}, a way to cut text, has no counterpart here"
        raise Mistake(f"{problem} → {TOKENIZER_WAY_OUT}")
    backend, _ = convert_gguf_tokenizer("llama", fields)
    if byte_level and pre_tokenizer in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if byte_level and pre_tokenizer in LLAMA_3:
        backend.model.ignore_merges = True
    return backend


def _prepend_token(backend: Any, token: str) -> None:
    """Puts `token` in front of every text that is encoded with special tokens, as llama.cpp does."""
    from tokenizers import processors

    identifier = backend.token_to_id(token)
    if identifier is not None:
        begin = {"id": "begin", "ids": [identifier], "tokens": [token]}
        pair = ["begin", "$A", "begin:1", "$B:1"]
        backend.post_processor = processors.TemplateProcessing(single=["begin", "$A"], pair=pair, special_tokens=[begin])
