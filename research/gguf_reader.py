"""A Llama in llama.cpp's GGUF format, read tensor by tensor and dequantised on the way. It may come from a stranger.

The `gguf` package (llama.cpp's own, pure Python) maps the file into memory and knows every packing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import gguf as names
from models.hf import settings
from parallel.errors import Mistake
from research.exchange import finite, regular

WAY_OUT = "take a whole GGUF file of a Llama"


class File:
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

    def __enter__(self) -> "File":
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
