"""A streamed file equals the one that safetensors writes; its size and hash are those of the bytes on disk."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.checkpoint.tensor_file import Entry, TensorFile, header
from parallel.files import sha256_of, write_synced

TENSORS = {
    "small": torch.arange(6.0).view(2, 3),
    "odd.name[0:3]": torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "more than is written at once": torch.randn(57, 1, generator=torch.Generator().manual_seed(1)),
    "signed zero": torch.tensor([-0.0, 0.0, torch.inf, torch.nan]),
}
AT_ONCE = 100
"""Bytes: three parts, the last of which is short, of the larger tensor; one of each other."""


def written(path: Path, tensors: dict[str, torch.Tensor]):
    file = TensorFile(path, [Entry(key, tuple(tensor.shape)) for key, tensor in tensors.items()], AT_ONCE)
    for tensor in tensors.values():
        file.add(tensor)
    return file.close()


def test_safetensors_reads_every_bit_back(tmp_path: Path) -> None:
    written(tmp_path / "a", TENSORS)
    found = load_file(tmp_path / "a")
    assert set(found) == set(TENSORS)
    assert all(found[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in TENSORS.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_for_other_programs_may_be_of_half_the_size(dtype: str, tmp_path: Path) -> None:
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in TENSORS.items()}
    file = TensorFile(tmp_path / "a", [Entry(key, tuple(tensor.shape), dtype) for key, tensor in tensors.items()], AT_ONCE)
    for tensor in tensors.values():
        file.add(tensor)
    told, found = file.close(), load_file(tmp_path / "a")
    assert told.size == (tmp_path / "a").stat().st_size < 2 * sum(tensor.numel() for tensor in tensors.values()) + 1000
    assert all(torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in tensors.items())


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    told = written(tmp_path / "a", TENSORS)
    data = (tmp_path / "a").read_bytes()
    assert (told.size, told.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sha256_of(tmp_path / "a") == told.sha256


def test_the_header_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(4, 2), "a": torch.zeros(3)}, tmp_path / "theirs", {"format": "pt"})
    theirs = (tmp_path / "theirs").read_bytes()
    length = int.from_bytes(theirs[:8], "little")
    order = sorted(name for name in json.loads(theirs[8 : 8 + length]) if name != "__metadata__")
    ours = header([Entry(name, {"b": (4, 2), "a": (3,)}[name]) for name in order])
    assert len(ours) % 8 == 0 and json.loads(ours[8:]) == json.loads(theirs[8 : 8 + length])


def test_a_view_in_another_order_is_written_in_its_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    written(tmp_path / "a", {"columns": whole[:, 1:3], "transposed": whole.T})
    found = load_file(tmp_path / "a")
    assert torch.equal(found["columns"], whole[:, 1:3]) and torch.equal(found["transposed"], whole.T)


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)])
def test_another_tensor_than_announced_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a", [Entry("a", (2, 3))])
    with pytest.raises(ValueError, match="was to follow"):
        file.add(tensor)


def test_a_file_is_not_closed_before_its_end(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a", [Entry("first", (1,)), Entry("second", (1,))])
    file.add(torch.zeros(1))
    with pytest.raises(ValueError, match="is to hold .*second.* too"):
        file.close()


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="the same name"):
        header([Entry("a", (1,)), Entry("a", (2,))])


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "a", [])
    assert (tmp_path / "a").read_text() == "mine"


def test_a_disk_that_takes_a_part_is_given_the_rest(tmp_path: Path) -> None:
    """A raw write may end early: what it did not take is written by the next one, and hashed once."""
    file = TensorFile(tmp_path / "a", [Entry("a", (1000,))])
    inner = file.file

    class Reluctant:
        def write(self, data) -> int:
            return inner.write(data[:100])

        def __getattr__(self, name: str):
            return getattr(inner, name)

    file.file = Reluctant()
    file.add(torch.arange(1000.0))
    told = file.close()
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.arange(1000.0)) and told.sha256 == sha256_of(tmp_path / "a")


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    write_synced(tmp_path / "a", b"long ago")
    write_synced(tmp_path / "a", b"now")
    assert (tmp_path / "a").read_bytes() == b"now" and sha256_of(tmp_path / "a") == hashlib.sha256(b"now").hexdigest()


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    """/dev/full refuses every byte; the file raises, and its writer (writer.py) keeps the error."""
    file = TensorFile(tmp_path / "a", [Entry("a", (1,))])
    with open("/dev/full", "wb", buffering=0) as full:
        file.file = full
        with pytest.raises(OSError) as refused:
            file.add(torch.zeros(1))
    assert refused.value.errno == errno.ENOSPC
