"""The verb import: what it makes, that it makes all of it or nothing, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion import mapping, read_config
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from research import __main__ as research_main
from research.cli import import_, runs
from research.config import experiment_folder, serialization
from research.data.run_tokenizer import load_tokenizer
from research.exchange import importer, parity
from research.exchange.importer import CERTIFICATE, Import
from research.tracking import run_folder
from research.tracking.run_folder import IMPORTED
from tests.research.helpers.hf_models import CASES, imported, their_folder, their_tokenizer, tree
from tests.research.helpers.launches import ROOT

CASE = "llama 3, tied"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return their_folder(tmp_path_factory.mktemp("theirs") / "model", CASE)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """(place, run) of one import."""
    place = tmp_path_factory.mktemp("made")
    return place, imported(folder, place, "mine")


def test_a_run_folder_that_later_verbs_take(made, folder):
    place, run = made
    told = json.loads(run.run.read_text())
    assert (told["status"], told["name"], told["id"], told["steps"]) == (IMPORTED, "mine", run.id, 0)
    assert run_folder.find(str(place / "runs" / "mine")).path == run.path
    assert runs.summarise(run)["status"] == IMPORTED
    found = serialization.load(run.config)
    assert dict(found.model) == dict(read_config.settings(CASES[CASE]))
    with Reader(latest(run.checkpoints)) as reader:
        reader.check()
        assert reader.facts["step"] == 0 and set(reader.facts["imported"]) == {"config.json", "model.safetensors"}
        assert list(reader.manifest.tensors) == ["weights"] and set(reader) == set(mapping.shapes(found.model))
    words = load_tokenizer(found.data, ROOT)
    assert words.encode("We, the people") == their_tokenizer()("We, the people").input_ids and words.end_of_text == 0
    certificate = json.loads((run.path / CERTIFICATE).read_text())
    assert certificate["passed"] and certificate["relative"] < 1e-5 and certificate["tokens"] == 512
    assert (run.path / "tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_an_experiment_whose_runs_begin_with_it(made):
    place, run = made
    loaded = experiment_folder.load(place / "tree" / "experiments" / "mine")
    assert loaded.experiment == serialization.load(run.config)
    assert loaded.experiment.init_from == str(latest(run.checkpoints))
    assert sorted(os.listdir(loaded.folder)) == ["config.py", "launch.py"]
    assert sorted(os.listdir(run.source)) == ["SHA256SUMS", "config.py"]
    launch = [sys.executable, str(loaded.folder / "launch.py")]
    shown = subprocess.run([*launch, "--dry-run"], capture_output=True, text=True, cwd=place, timeout=60)
    assert shown.returncode == 0 and "2 layers" in shown.stdout, shown.stderr
    resumed = subprocess.run([*launch, "--resume", str(run.path)], capture_output=True, text=True, cwd=place, timeout=60)
    assert resumed.returncode == 2 and "was imported, not trained" in resumed.stderr


def test_inside_a_tree_paths_are_relative_to_it(folder, tmp_path):
    import_.main([str(folder), "--as", str(tree(tmp_path) / "experiments" / "mine")])
    settings = experiment_folder.load(tmp_path / "tree" / "experiments" / "mine").experiment
    assert settings.init_from.startswith("runs/mine/") and settings.data.tokenizer.startswith("runs/mine/")
    assert (tmp_path / "tree" / settings.init_from / "manifest.json").is_file()
    assert (tmp_path / "tree" / settings.data.tokenizer).is_file() and settings.track.runs == "runs"


def test_gpt_2_s_tokenizer_or_a_file_may_be_named_instead(folder, tmp_path):
    """A model of 331 tokens has no room for GPT-2's, and a folder without a tokenizer none at all."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, bare / name)
    with pytest.raises(Mistake, match="bare/tokenizer.json is not there → .* --tokenizer builtin:gpt2, --tokenizer PATH"):
        imported(bare, tmp_path, "mine")
    with pytest.raises(Mistake, match="the tokenizer has 50257 tokens, the model 331 → name the one it was trained with"):
        imported(bare, tmp_path, "mine", "--tokenizer", "builtin:gpt2")
    with pytest.raises(Mistake, match="--tokenizer builtin:bpe-300 is not one"):
        imported(bare, tmp_path, "mine", "--tokenizer", "builtin:bpe-300")
    run = imported(bare, tmp_path, "mine", "--tokenizer", str(folder / "tokenizer.json"))
    assert serialization.load(run.config).data.tokenizer == str(run.path / "tokenizer" / "tokenizer.json")


def everything_below(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def fails(act, place: Path, error: type[BaseException], words: str = "") -> None:
    """`act` raises, and leaves the place as it was."""
    before = everything_below(place)
    with pytest.raises(error, match=words):
        act()
    left = set(everything_below(place)) - set(before)
    assert left <= {"runs", "tree/runs"}, left  # the empty folder of all runs


def test_a_model_that_computes_something_else_fails_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    """Ours with another epsilon, as a misread setting would have it."""
    tree(tmp_path)
    right = parity.our_logits
    wrong = lambda model, *more: right(model.model_copy(update={"norm_eps": 1e-3}), *more)  # noqa: E731
    monkeypatch.setattr(parity, "our_logits", wrong)
    fails(lambda: imported(folder, tmp_path, "mine"), tmp_path, SystemExit, "1")
    assert "parity   FAILED · largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [pytest.param(Mistake, marks=pytest.mark.slow), KeyboardInterrupt, pytest.param(MemoryError, marks=pytest.mark.slow)]
)
def test_whenever_it_ends_early_nothing_is_left(error, folder, tmp_path, monkeypatch):
    """Between the first files and the last rename."""
    tree(tmp_path)

    def raises(*arguments):
        raise error("now")

    steps = [
        (Import, "_make_tokenizer"),
        (importer, "sha256_of"),
        (Import, "_write_metadata"),
        (run_folder, "keep_source"),
        (Path, "rename"),
    ]
    for owner, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raises)
            fails(lambda: imported(folder, tmp_path, "mine"), tmp_path, error, "now")
    imported(folder, tmp_path, "mine")


def test_what_is_there_is_never_overwritten(made, folder):
    place, _ = made
    fails(lambda: imported(folder, place, "mine"), place, Mistake, "experiments/mine is there already")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "--as", "{tree}/experiments/../../x"], "is not the place of an experiment → write --as experiments/NAME"),
        (["{model}", "--as", "{tree}/mine"], "is not the place of an experiment"),
        (["{model}", "--as", "{tree}/experiments/a b"], "is not the place of an experiment"),
        (["{model}", "--as", "{tree}/experiments/.x"], "is not the place of an experiment"),
        (["nowhere", "--as", "{tree}/experiments/mine"], "there is no nowhere → name a Hugging Face folder .*: nothing is downloaded"),
        (["{model}/config.json", "--as", "{tree}/experiments/mine"], "config.json is neither a folder nor a .gguf file"),
        (["{model}"], "the following arguments are required: --as"),
        (["{model}", "--as", "{tree}/experiments/mine", "--runs", "{model}/config.json"], "--runs: .* cannot be made"),
    ],
)
def test_mistakes(arguments, words, folder, tmp_path):
    where = {"model": folder, "tree": tree(tmp_path)}
    fails(lambda: import_.main([word.format(**where) for word in arguments]), tmp_path, Mistake, words)


def test_damage_is_one_sentence_on_the_command_line_and_exit_code_2(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, broken / name)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    where = tree(tmp_path) / "experiments" / "mine"
    assert research_main.main(["import", str(broken), "--as", str(where)]) == 2
    assert (
        capsys.readouterr().err
        == "error  model.layers.1.mlp.up_proj.weight holds values that are not finite → such a model has diverged: take another one\n"
    )
    assert not where.exists() and os.listdir(tmp_path / "tree" / "runs") == []
