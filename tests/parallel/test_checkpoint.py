"""Checkpoints: written by any layout, read here with safetensors' numpy reader and json; damage is found, a killed writer loses nothing."""

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from models import gpt
from models.config import GPT
from parallel import checkpoint
from parallel.checkpoint import Reader, latest, load_weights, write
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.harness import RankFailed, run_ranks
from tests.parallel import training
from tests.parallel.training import MODEL, SEED

WRITERS = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "TP2·PP2": (4, dict(tensor=2, pipe=2)),
    "PP2, bf16": (2, dict(pipe=2, precision="bf16")),
}


@pytest.fixture(scope="module")
def written():
    """written(layout, steps): the folder of a checkpoint, made once; tests that change one work on a copy of their own."""
    with tempfile.TemporaryDirectory() as parent:

        @functools.cache
        def make(layout: str, steps: int) -> Path:
            world, settings = WRITERS[layout]
            folder = Path(parent) / f"{layout}-{steps}" / f"step_{steps:06d}"
            run_ranks(training.call, world, dict(settings, steps=steps, save=str(folder)))
            return folder

        yield make


def by_another_reader(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the files that lie there, each name once."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(tensors) & set(found), "a tensor is written twice"
        found |= tensors
    return found


def initial_weights() -> dict[str, np.ndarray]:
    """The logical weights as one process draws them."""
    module = PlainModule(gpt.layers(GPT(**MODEL), Grid(), seed=SEED))
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("layout", WRITERS)
def test_untrained_weights_are_the_drawn_ones_bit_for_bit(layout: str, written) -> None:
    found, expected = by_another_reader(written(layout, 0)), initial_weights()
    if "bf16" in layout:  # the masters are made from the rounded weights
        expected = {name: torch.from_numpy(value).bfloat16().float().numpy() for name, value in expected.items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == value.shape and found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("layout", ["TP2", "ZeRO-3", "TP2·PP2"])
def test_trained_weights_are_those_of_one_rank(layout: str, written) -> None:
    found, expected, before = by_another_reader(written(layout, 3)), by_another_reader(written("one rank", 3)), initial_weights()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name
    moved = max(np.linalg.norm(value - before[name]) / np.linalg.norm(value) for name, value in expected.items())
    assert moved > 1e-3, "nothing was trained, so nothing was compared"


@pytest.mark.parametrize("layout", WRITERS)
def test_the_manifest_says_what_lies_there(layout: str, written) -> None:
    folder = written(layout, 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 0
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        described = {key: value for key, value in manifest["tensors"].items() if value["file"] == name}
        assert {key: (value["shape"], value["dtype"]) for key, value in described.items()} == {
            key: (list(value.shape), "float32") for key, value in load_file(folder / name).items()
        }
    Reader(folder).check()
    assert latest(folder.parent) == folder


def test_the_tied_table_is_written_once_and_without_padding(written) -> None:
    found = by_another_reader(written("TP2·PP2", 0))
    assert found["embedding.weight"].shape == (83, 32) and "head.weight" not in found


def test_data_ranks_share_the_writing(written) -> None:
    shares = [len(load_file(file)) for file in sorted(written("ZeRO-3", 0).glob("*.safetensors"))]
    assert len(shares) == 2 and abs(shares[0] - shares[1]) <= 1


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_any_rank_of_any_layout_loads_its_slices(degree: int, written) -> None:
    reader, full = Reader(written("TP2·PP2", 3)), by_another_reader(written("TP2·PP2", 3))
    for rank in range(degree):
        module = PlainModule(gpt.layers(GPT(**MODEL), Grid(tensor=degree, rank=rank), seed=SEED + 1))
        load_weights(module, reader, Grid(tensor=degree, rank=rank))
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, parameter.slice.cut(torch.from_numpy(full[name]), rank, degree)), name


def test_another_model_is_refused_with_both_shapes(written) -> None:
    module = PlainModule(gpt.layers(GPT(**MODEL | {"vocab_size": 84}), Grid(), seed=SEED))
    with pytest.raises(Mistake, match=r"embedding.weight is \[83, 32\] in .* and \[84, 32\] in this model"):
        load_weights(module, Reader(written("one rank", 0)), Grid())


# Damage and malice. These write in one process: a world of one needs no process group.

TENSORS = {f"layer.{i}.weight": torch.full((4, 5), float(i)) for i in range(6)}


def save(folder: Path, offset: float = 0.0) -> Path:
    write(folder, [(name, tensor + offset) for name, tensor in TENSORS.items()], {"step": 1}, Grid())
    return folder


def change_manifest(folder: Path, change) -> Reader:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return Reader(folder)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_flipped_bit_is_found(place: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "step")
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(Mistake, match=f"{file.name} is damaged: SHA-256 .* the manifest says"):
        Reader(folder).check()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: os.truncate(file, 50)], ids=["missing", "truncated"])
def test_a_missing_or_short_file_is_found_and_not_read(damage, tmp_path: Path) -> None:
    folder = save(tmp_path / "step")
    (file,) = folder.glob("*.safetensors")
    damage(file)
    with pytest.raises(Mistake, match=f"{file.name} is damaged"):
        Reader(folder).check()
    with pytest.raises(Mistake, match=f"{file.name} cannot be read"):
        Reader(folder).read("layer.0.weight")


@pytest.mark.parametrize("path", ["../outside.safetensors", "/tmp/outside.safetensors", "inner/../../outside.safetensors", "..", "."])
def test_a_manifest_cannot_point_outside(path: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "step")
    (file,) = folder.glob("*.safetensors")
    (tmp_path / "outside.safetensors").write_bytes(file.read_bytes())
    reader = change_manifest(folder, lambda manifest: manifest["tensors"]["layer.0.weight"].update(file=path))
    with pytest.raises(Mistake):
        reader.read("layer.0.weight")
    assert reader.read("layer.1.weight")[0, 0] == 1.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "tensors": {}}', '{"format": 1, "tens', "\x00", pytest.param("[" * 100_000, id="deep")]
)
def test_what_is_no_manifest_is_refused_in_words(text: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "step")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(Mistake, match="not a checkpoint|reads format 1"):
        Reader(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest["tensors"]["layer.0.weight"].pop("file"), "tensors['layer.0.weight'] has no file that is str"),
        (lambda manifest: manifest["tensors"]["layer.0.weight"].update(file=["a"]), "tensors['layer.0.weight'] has no file that is str"),
        (lambda manifest: manifest["tensors"].update({"layer.1.weight": "weights"}), "tensors['layer.1.weight'] has no file that is str"),
        (lambda manifest: manifest.update(tensors=[1]), "tensors in its manifest.json is not a table"),
        (lambda manifest: manifest.pop("files"), "files in its manifest.json is not a table"),
        (lambda manifest: next(iter(manifest["files"].values())).pop("sha256"), "has no sha256 that is str"),
        (lambda manifest: next(iter(manifest["files"].values())).update(size="1"), "has no size that is int"),
    ],
)
def test_entries_of_a_wrong_shape_are_refused_in_words(change, words: str, tmp_path: Path) -> None:
    with pytest.raises(Mistake) as refused:
        change_manifest(save(tmp_path / "step"), change)
    assert words in str(refused.value) and "→" in str(refused.value), str(refused.value)


def test_a_file_name_that_no_system_has_is_refused_in_words(tmp_path: Path) -> None:
    reader = change_manifest(save(tmp_path / "step"), lambda manifest: manifest["tensors"]["layer.0.weight"].update(file="a\0b"))
    with pytest.raises(Mistake, match="cannot be read"):
        reader.read("layer.0.weight")


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="holds no tensor blocks.9 → it holds 6, e.g. layer.0.weight"):
        Reader(save(tmp_path / "step")).read("blocks.9")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "step_9", "a/b"])
def test_latest_names_a_checkpoint_beside_it_or_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path / "run" / "step_1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "latest").write_text(name)
    with pytest.raises(Mistake, match="not a checkpoint beside it"):
        latest(tmp_path / "run")


def test_a_run_without_a_checkpoint_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="holds no complete checkpoint"):
        latest(tmp_path)


def test_files_are_cut_at_their_size_and_read_as_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "BYTES_PER_FILE", 200)  # two tensors of 80 bytes
    folder = save(tmp_path / "step")
    assert [len(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [2, 2, 2]
    reader = Reader(folder)
    assert list(reader) == list(TENSORS) and all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


# Writers that die.


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_the_same_step_saved_again_replaces_the_older(tmp_path: Path) -> None:
    save(tmp_path / "step")
    save(tmp_path / "step", offset=10.0)
    assert Reader(latest(tmp_path)).read("layer.1.weight")[0, 0] == 11.0 and hidden(tmp_path) == []


def save_and_die(folder: Path, victim: str) -> None:
    """Saves again, and is killed where it reaches `victim`; "rename#2": where it would rename for the second time."""
    name, _, nth = victim.partition("#")
    owner = Path if name == "rename" else checkpoint
    inner, calls = getattr(owner, name), []

    def deadly(*arguments):
        calls.append(arguments)
        if len(calls) == int(nth or 1):
            os._exit(9)
        return inner(*arguments)

    setattr(owner, name, deadly)
    save(folder, offset=10.0)


DEATHS = ["_write_file", "_publish", "_sync_folder", "rename#1", "rename#2", "_sync_folder#2"]


@pytest.mark.parametrize("victim", [victim for victim in DEATHS if victim != "rename#2"])  # a new step is renamed once
def test_a_writer_killed_anywhere_leaves_a_complete_latest(victim: str, tmp_path: Path) -> None:
    """Another step while the first is there: whatever the moment, `latest` is one of the two, whole."""
    save(tmp_path / "step_1")
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(save_and_die, 1, tmp_path / "step_2", victim)
    Reader(latest(tmp_path)).check()
    assert (latest(tmp_path).name, victim == "_sync_folder#2") in [("step_1", False), ("step_2", True)]
    complete = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert complete and all(Reader(path).check() is None for path in complete), "a folder without a dot is complete"
    save(tmp_path / "step_2", offset=20.0)
    assert Reader(latest(tmp_path)).read("layer.0.weight")[0, 0] == 20.0 and hidden(tmp_path) == []


@pytest.mark.parametrize("victim", DEATHS)
def test_a_writer_killed_while_it_replaces_a_step_loses_nothing(victim: str, tmp_path: Path) -> None:
    save(tmp_path / "step_1")
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(save_and_die, 1, tmp_path / "step_1", victim)
    reader = Reader(latest(tmp_path))
    reader.check()
    assert float(reader.read("layer.0.weight")[0, 0]) == (10.0 if victim == "_sync_folder#2" else 0.0)
    save(tmp_path / "step_1", offset=20.0)
    assert Reader(latest(tmp_path)).read("layer.0.weight")[0, 0] == 20.0 and hidden(tmp_path) == []
