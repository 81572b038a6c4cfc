"""The reader returns any region of any tensor for any slicing, and detects every kind of damage to the files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from parallel.checkpoint.folder import MANIFEST, retain
from parallel.checkpoint.manifest import MAX_BYTES
from parallel.checkpoint.reader import Reader, load_weights
from parallel.checkpoint.writer import CheckpointWriter, Part
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.slices import Slice, make_parameter
from tests.parallel.helpers.checkpoints import TENSORS, change_manifest, save

WHOLE = torch.arange(11 * 6.0).view(11, 6)
CUTS = {
    "by rows": Slice((11, 6), 0, (11,)),  # a vocabulary that no degree divides
    "fused": Slice((11, 6), 0, (2, 4, 5)),
    "by columns": Slice((11, 6), 1, (6,)),
    "replicated": Slice((11, 6)),
}


def cut_up(folder: Path, bounds: list[int], dim: int) -> Path:
    """WHOLE as pieces along `dim`, in the wrong order."""
    spans = list(zip(bounds, bounds[1:], strict=False))[::-1]
    parts = [Part("weights", "a", (11, 6), dim, first, last - first) for first, last in spans]
    writing = CheckpointWriter(folder, parts, {"step": 1}, Grid())
    for first, last in spans:
        writing.write(WHOLE.narrow(dim, first, last - first))
    writing.finish()
    return folder


@pytest.fixture(params=[([0, 11], 0), ([0, 1, 4, 5, 11], 0), ([0, 6], 1), ([0, 2, 3, 6], 1)], ids=str)
def reader(request, tmp_path: Path):
    bounds, dim = request.param
    with Reader(cut_up(tmp_path / "step_1", bounds, dim)) as reader:
        yield reader


def test_every_region_is_what_numpy_cuts(reader: Reader) -> None:
    whole = WHOLE.numpy()
    for rows in [(0, 11), (0, 1), (3, 9), (4, 5), (10, 11), (5, 5)]:
        for columns in [(0, 6), (1, 3), (2, 2), (5, 6)]:
            found = reader.read_region("a", [rows, columns])
            assert np.array_equal(found.numpy(), whole[slice(*rows), slice(*columns)]), (rows, columns)
    assert torch.equal(reader.read("a"), WHOLE)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_rows_of_any_rank_are_those_of_its_slice(name: str, degree: int, reader: Reader) -> None:
    cut = CUTS[name]
    for rank in range(degree):
        piece = cut.cut(WHOLE, rank, degree)
        assert torch.equal(reader.read_rows("a", cut, rank, degree), piece)
        for first in range(0, len(piece), 3):
            for last in range(first + 1, len(piece) + 1, 2):
                assert torch.equal(reader.read_rows("a", cut, rank, degree, (first, last)), piece[first:last]), (rank, first, last)


def test_only_what_is_asked_for_is_read(reader: Reader, monkeypatch) -> None:
    """The regions that safetensors is asked for add up to the region that is wanted."""
    asked: list[int] = []
    inner = Reader._read_piece

    def counting(self, piece, tensor, within):
        values = inner(self, piece, tensor, within)
        asked.append(values.numel())
        return values

    monkeypatch.setattr(Reader, "_read_piece", counting)
    reader.read_region("a", [(3, 9), (1, 3)])
    assert sum(asked) == 12


class Module(torch.nn.Module):
    def __init__(self, cut: Slice, grid: Grid) -> None:
        super().__init__()
        self.a = make_parameter("a", torch.zeros(cut.shape), cut, grid.tensor_rank, grid.tensor)


@pytest.mark.parametrize("name", CUTS)
def test_a_plain_module_takes_its_slices(name: str, reader: Reader) -> None:
    for rank in range(2):
        grid = Grid(tensor=2, rank=rank)
        module = Module(CUTS[name], grid)
        load_weights(module, reader, grid)
        assert torch.equal(module.a.detach(), CUTS[name].cut(WHOLE, rank, 2))


def test_another_shape_is_refused_with_both(reader: Reader) -> None:
    with pytest.raises(Mistake, match=r"a is \[11, 6\] in .* and \[12, 6\] in this model"):
        load_weights(Module(Slice((12, 6)), Grid()), reader, Grid())


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    words = "holds no tensor blocks.9 → it holds 6, e.g. layer.0.weight"
    with Reader(save(tmp_path / "step_1")) as reader, pytest.raises(Mistake, match=words):
        reader.read("blocks.9")


def test_a_kind_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with Reader(save(tmp_path / "step_1")) as reader, pytest.raises(Mistake, match="holds no exp_avg, only weights → "):
        reader.read("layer.0.weight", "exp_avg")


def test_many_files_are_not_open_at_once(tmp_path: Path) -> None:
    parts = [Part("weights", f"t{i}", (1,), 0, 0, 1) for i in range(8)]
    writing = CheckpointWriter(tmp_path / "step_1", parts, {"step": 1}, Grid(), bytes_per_file=1)
    for i in range(len(parts)):
        writing.write(torch.tensor([float(i)]))
    writing.finish()
    with Reader(tmp_path / "step_1", open_at_once=3) as reader:
        for _ in range(2):
            assert [float(reader.read(name)) for name in reader] == list(range(8))
            assert len(reader._open) == 3


# Damage.


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("place", [0, 8, 100, -1])
def test_one_flipped_bit_is_found(place: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1")
    file = the_file(folder)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with Reader(folder) as reader, pytest.raises(Mistake, match=f"{file.name} is damaged: SHA-256 .* the manifest says .* → use another"):
        reader.check()


DAMAGE = {
    "missing": (lambda file: file.unlink(), "missing, the manifest says"),
    "empty": (lambda file: os.truncate(file, 0), "0 bytes, the manifest says"),
    "cut short": (lambda file: os.truncate(file, 50), "50 bytes, the manifest says"),
    "longer": (lambda file: file.open("ab").write(b"x"), r"\d+ bytes, the manifest says"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "missing, the manifest says"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "missing, the manifest says"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_what_was_written_is_found_and_not_read(name: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    folder = save(tmp_path / "step_1")
    file = the_file(folder)
    damage(file)
    with Reader(folder) as reader:
        with pytest.raises(Mistake, match=f"{file.name} is damaged: {words}"):
            reader.check()
        if name != "longer":  # which safetensors refuses, or ignores
            with pytest.raises(Mistake, match=f"{file.name} cannot be read"):
                reader.read("layer.0.weight")


def test_ranks_share_the_checking(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1", bytes_per_file=100)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 6
    os.truncate(files[3], 10)
    with Reader(folder) as reader:
        found = []
        for share in range(4):
            try:
                reader.check(share, of=4)
            except Mistake:
                found.append(share)
    assert found == [3]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"layer.0.weight": torch.zeros(4, 4)}, r"layer.0.weight is \('F32', \(4, 4\)\), the manifest says \('F32', \(4, 5\)\)"),
        ({"layer.0.weight": torch.zeros(4, 5, dtype=torch.int32)}, r"is \('I32', \(4, 5\)\), the manifest says"),
        ({"other": torch.zeros(400, 5)}, "cannot be read: File does not contain tensor layer.0.weight"),
    ],
)
def test_a_file_that_the_manifest_does_not_describe_is_refused(tensors: dict, words: str, tmp_path: Path) -> None:
    """Its hash may be right: a stranger can compute one."""
    folder = save(tmp_path / "step_1")
    save_file(tensors, the_file(folder))
    with Reader(folder) as reader, pytest.raises(Mistake, match=words):
        reader.read("layer.0.weight")


HEADERS = {
    "no header": b"",
    "a header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "no JSON": (8).to_bytes(8, "little") + b"\xff" * 8,
    "tensors beyond the end": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_file_is_refused_in_words(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1")
    data = HEADERS[name]
    if name == "tensors beyond the end":
        text = json.dumps({"layer.0.weight": {"dtype": "F32", "shape": [4, 5], "data_offsets": [10**12, 10**12 + 80]}}).encode()
        data = len(text).to_bytes(8, "little") + text
    the_file(folder).write_bytes(data)
    with Reader(folder) as reader, pytest.raises(Mistake, match="cannot be read"):
        reader.read("layer.0.weight")


# What is no checkpoint.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "can be read: Expecting value.* → use another checkpoint of its run"),
        ("{}", "it has no format"),
        ('{"format": 1, "tensors": {}}', "it has format 1, this version reads format 2 .* → use the version that wrote it"),
        ("\x00", "Expecting value"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_with_its_folder(text: str, words: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(Mistake, match=words) as refused:
        Reader(folder)
    assert str(folder) in str(refused.value)


def test_a_manifest_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1")
    os.truncate(folder / MANIFEST, 2**40)  # a sparse file
    with pytest.raises(Mistake, match=f"it has more than {MAX_BYTES} bytes"):
        Reader(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(Mistake, match="is not a checkpoint: its manifest.json cannot be read .No such file"):
            Reader(folder)


def test_a_checkpoint_replaced_while_it_is_read_is_not_mixed_with_the_other(tmp_path: Path) -> None:
    with Reader(save(tmp_path / "step_1")) as reader:
        save(tmp_path / "step_1", offset=10.0)
        with pytest.raises(Mistake, match="was replaced by another one of its name"):
            reader.read("layer.0.weight")


def test_what_was_open_stays_readable_when_it_is_replaced(tmp_path: Path) -> None:
    with Reader(save(tmp_path / "step_1")) as reader:
        reader.read("layer.0.weight")
        save(tmp_path / "step_1", offset=10.0)
        assert torch.equal(reader.read("layer.5.weight"), TENSORS["layer.5.weight"])


def test_a_broken_manifest_leaves_nothing_held(tmp_path: Path) -> None:
    """Otherwise `retain` would spare it for as long as this process lives."""
    for step in (1, 2):
        save(tmp_path / f"step_{step}")
    change_manifest(tmp_path / "step_1", lambda manifest: manifest.pop("step"))
    with pytest.raises(Mistake):
        Reader(tmp_path / "step_1")
    assert retain(tmp_path, 1) == ["step_1"]
