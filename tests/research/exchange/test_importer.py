"""What an import puts into a run's folder, step by step: which reader is taken, how paths are named, which tokenizer, in what order."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from models.conversion import read_config
from models.estimates.parameters import parameters
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from research.cli import import_
from research.config import serialization
from research.data import tokenizer_file
from research.exchange import parity
from research.exchange.gguf import GGUFFile
from research.exchange.hf_reader import HFFolder
from research.exchange.importer import CERTIFICATE, CHECKPOINT, Import, opened
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from tests.research.helpers import gguf_files
from tests.research.helpers.hf_models import CASES, their_folder, their_tokenizer, tree
from tests.research.helpers.launches import ROOT

CASE = "pythia"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return their_folder(tmp_path_factory.mktemp("theirs") / "model", CASE, max_shard_size="60KB")


def begun(source, place: Path, runs: Path | None = None) -> Import:
    """An import whose run will lie in `runs` (default: in the tree)."""
    where = place / "tree" if (place / "tree").is_dir() else tree(place)
    root = runs or where / "runs"
    (root / ".staging").mkdir(parents=True)
    return Import(source, RunFolder(root / ".staging"), RunFolder(root / "mine" / "abcdef"), where)


def test_a_folder_and_a_file_each_have_their_reader(folder, tmp_path):
    with opened(folder) as source:
        assert isinstance(source, HFFolder) and source.family.name == "gpt_neox"
    with opened(gguf_files.write(tmp_path / "m.gguf")) as file:
        assert isinstance(file, GGUFFile)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "there is no .*nowhere → name a Hugging Face folder or a .gguf file on this machine: nothing is downloaded"),
        ("org/model", "there is no .*org/model → .*: nothing is downloaded"),
        ("model.bin", "model.bin is neither a folder nor a .gguf file → name the folder that holds the model's config.json"),
        ("empty", "empty/config.json cannot be read"),
        ("broken", "there is no .*broken"),
    ],
)
def test_what_is_neither_is_told_what_is(name, words, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Mistake, match=words):
        import_.check_exists(tmp_path / name)
        with opened(tmp_path / name):
            raise AssertionError("nothing is opened")


def test_a_folder_with_pickles_alone_says_how_to_go_on(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    words = "pytorch_model.bin is a pickle, which is a program: it is not opened → .*save_pretrained"
    with pytest.raises(Mistake, match=words), opened(tmp_path):
        raise AssertionError("nothing is opened")


def test_the_line_says_what_it_is(folder, tmp_path):
    with opened(folder) as source:
        line = begun(source, tmp_path).line()
    size = sum(parameter.numel() for parameter in _their_parameters())
    assert line == f"import model · gpt_neox · 2 layers, hidden 64, 4 heads · {size / 1e3:.1f} k parameters"
    assert parameters(read_config.settings(CASES[CASE])) == size


def _their_parameters():
    from tests.research.helpers.hf_models import their_model

    return their_model(CASE).parameters()


def test_paths_are_named_as_they_will_be(folder, tmp_path):
    """Staged under a hidden name, named by the last one: from the tree where they lie in it, whole elsewhere."""
    with opened(folder) as source:
        inside = begun(source, tmp_path)
        assert inside.named(inside.staging.checkpoints / CHECKPOINT) == "runs/mine/abcdef/checkpoints/step_000000"
        outside = begun(source, tmp_path, tmp_path / "elsewhere")
        assert outside.named(outside.staging.path / "tokenizer") == str(tmp_path / "elsewhere" / "mine" / "abcdef" / "tokenizer")


def test_the_folder_is_filled_and_the_certificate_says_from_what(folder, tmp_path):
    with opened(folder) as source:
        found = begun(source, tmp_path)
        certificate = found.fill(None, Console())
        staged = found.staging
        assert certificate.passed and json.loads((staged.path / CERTIFICATE).read_text()) == certificate.table()
        with Reader(latest(staged.checkpoints)) as reader:
            assert reader.facts["imported"].keys() == {path.name for path in source.files()}
            assert len(reader.facts["imported"]) > 3  # the index, the settings and every shard
    told = json.loads(staged.run.read_text())
    assert (told["name"], told["id"], told["source"], told["family"]) == ("mine", "abcdef", "model", "gpt_neox")
    settings = serialization.load(staged.config)
    assert (settings.init_from, settings.track.runs) == ("runs/mine/abcdef/checkpoints/step_000000", "runs")
    assert sorted(os.listdir(staged.path)) == [CERTIFICATE, "checkpoints", "config.json", "logs", "run.json", "tokenizer"]


def test_what_cannot_work_is_known_before_a_weight_is_read(folder, tmp_path, monkeypatch):
    """A tokenizer of more tokens than the model has rows."""
    monkeypatch.setattr(HFFolder, "read", lambda *arguments: pytest.fail("a weight was read"))
    missing = str(tmp_path / "tokenizer.json")
    for i, (words, said) in enumerate([(missing, "tokenizer.json is not there"), ("builtin:gpt2", "has 50257 tokens, the model")]):
        with opened(folder) as source, pytest.raises(Mistake, match=said):
            begun(source, tmp_path, tmp_path / str(i)).fill(words, Console())


def test_gpt_2_s_own_tokenizer_is_named_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "wide", type(CASES["gpt2"])(n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=50257))
    with opened(their_folder(tmp_path / "model", "wide")) as source:
        found = begun(source, tmp_path)
        assert found.fill("builtin:gpt2", Console()).passed
    assert serialization.load(found.staging.config).data.tokenizer == "builtin:gpt2"
    assert not (found.staging.path / "tokenizer").exists()


def test_a_file_of_another_place_replaces_the_model_s_own(folder, tmp_path):
    their_tokenizer().save_pretrained(tmp_path / "mine")
    with opened(folder) as source:
        found = begun(source, tmp_path)
        found.fill(str(tmp_path / "mine" / tokenizer_file.FILE), Console())
    copied = found.staging.path / "tokenizer" / tokenizer_file.FILE
    assert copied.read_bytes() == (tmp_path / "mine" / tokenizer_file.FILE).read_bytes()


def test_a_certificate_that_fails_is_returned_not_raised(folder, tmp_path, monkeypatch):
    """Who asked says so and leaves nothing; the numbers are needed for that."""
    monkeypatch.setattr(parity.Certificate, "passed", property(lambda self: False))
    with opened(folder) as source:
        certificate = begun(source, tmp_path).fill(None, Console())
    assert not certificate.passed and certificate.table()["passed"] is False


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: an error, not a signal
from research.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.exit(main(["import", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("size", [500, 4000, 100_000])
def test_a_disk_that_fills_is_one_sentence_and_leaves_nothing(size, folder, tmp_path):
    """In a table, in the tokenizer's file, and in the weights'."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    where = tree(tmp_path)
    command = [sys.executable, "-c", FULL.format(size=size), str(folder), "--as", str(where / "experiments" / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error  ") and "→" in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(where / "runs") == [] and sorted(os.listdir(where / "experiments")) == ["gpt_sotu"]
