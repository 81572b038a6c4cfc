"""Files of weights as safetensors' own reader and transformers' index have them: where they are cut, what they refuse to hold."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from parallel.checkpoint.tensor_file import Entry
from parallel.errors import Mistake
from parallel.files import write_json
from research.exchange.hf_reader import INDEX, SHARD, SINGLE
from research.exchange.hf_writer import TensorShape, assign_files, write_weights

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (5, 4), "c.weight": (1, 2)}
WRITTEN = [TensorShape(key, shape) for key, shape in SHAPES.items()]
DTYPES = ["float32", "bfloat16", "float16"]


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=g) for key, shape in SHAPES.items()}


def names(files) -> list[list[str]]:
    return [[entry.key for entry in entries] for _, entries in files]


def sizes(dtype: str, largest: int) -> list[int]:
    return [sum(entry.size for entry in entries) for _, entries in assign_files(WRITTEN, dtype, largest)]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (10**9, [["a.weight", "a.bias", "b.weight", "c.weight"]]),
        (152, [["a.weight", "a.bias", "b.weight", "c.weight"]]),  # 48 + 16 + 80 + 8 bytes: just so
        (151, [["a.weight", "a.bias", "b.weight"], ["c.weight"]]),
        (64, [["a.weight", "a.bias"], ["b.weight"], ["c.weight"]]),  # b alone is larger: a tensor is never cut
        (1, [["a.weight"], ["a.bias"], ["b.weight"], ["c.weight"]]),
    ],
)
def test_files_are_cut_at_the_size_asked_for_in_order(largest, expected):
    assert names(assign_files(WRITTEN, "float32", largest)) == expected


def test_the_size_is_of_what_is_written():
    assert sizes("float32", 76) == [64, 80, 8] and sizes("bfloat16", 76) == sizes("float16", 76) == [76]


def test_names_are_those_that_transformers_gives_and_that_we_read():
    one, several = assign_files(WRITTEN, "float32", 10**9), assign_files(WRITTEN, "float32", 64)
    assert [name for name, _ in one] == [SINGLE]
    assert [name for name, _ in several] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(SHARD.fullmatch(name) for name, _ in several)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [10**9, 64])
def test_safetensors_reads_what_was_given_rounded_once(dtype, largest, tmp_path):
    files = assign_files(WRITTEN, dtype, largest)
    write_weights(tmp_path, files, iter(tensors().values()))
    found = {key: tensor for name, _ in files for key, tensor in load_file(tmp_path / name).items()}
    true = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors().items()}
    assert found.keys() == true.keys() and all(torch.equal(found[key], tensor) for key, tensor in true.items())
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in found.values())
    for name, entries in files:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
            assert set(file.keys()) == {entry.key for entry in entries}
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {entry.key: name for name, entries in files for entry in entries}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in true.values())


def test_tensors_may_lie_in_memory_in_any_order(tmp_path):
    """A transposed view is written as it reads, not as it lies."""
    tensor = torch.arange(12.0).view(3, 4).t()
    write_weights(tmp_path, [(SINGLE, [Entry("a", (4, 3))])], [tensor])
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (70_000.0, "float16", "b.weight does not fit into float16 → take another checkpoint, or --dtype bfloat16 or float32"),
        (3.4e38, "bfloat16", "b.weight does not fit into bfloat16"),
        (torch.nan, "float32", "b.weight holds values that are not finite"),
        (-torch.inf, "bfloat16", "b.weight holds values that are not finite"),
    ],
)
def test_a_number_that_the_file_cannot_hold_is_refused(value, dtype, words, tmp_path):
    spoiled = tensors()
    spoiled["b.weight"][2, 1] = value
    with pytest.raises(Mistake, match=words):
        write_weights(tmp_path, assign_files(WRITTEN, dtype, 10**9), spoiled.values())


def test_the_largest_numbers_of_each_kind_are_held(tmp_path):
    for dtype in DTYPES:
        largest = float(torch.finfo(getattr(torch, dtype)).max)
        (tmp_path / dtype).mkdir()
        write_weights(tmp_path / dtype, [(SINGLE, [Entry("a", (1,), dtype)])], [torch.tensor([largest])])
        assert float(load_file(tmp_path / dtype / SINGLE)["a"]) == largest


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    """The next is made when the last is on its way to the disk."""
    asked = []

    def stream():
        for key, tensor in tensors().items():
            held = sum(path.stat().st_size for path in tmp_path.iterdir())
            assert held >= sum(tensors()[earlier].nbytes for earlier in asked)
            asked.append(key)
            yield tensor

    write_weights(tmp_path, assign_files(WRITTEN, "float32", 10**9), stream())
    assert asked == list(SHAPES)


def test_after_an_error_no_file_is_held_open(tmp_path):
    def stream():
        yield tensors()["a.weight"]
        raise KeyboardInterrupt

    before = os.listdir("/proc/self/fd")
    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path, assign_files(WRITTEN, "float32", 10**9), stream())
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_table_is_json_and_nothing_that_json_lacks(tmp_path):
    write_json(tmp_path / "t.json", {"é": [1, None, 1e-5], "a": "→"})
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == {"é": [1, None, 1e-5], "a": "→"}
    with pytest.raises(ValueError):
        write_json(tmp_path / "t.json", {"a": float("nan")})
