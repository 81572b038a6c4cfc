"""The two sides of a certificate: ours is the checkpoint, theirs the files, no program of the folder runs, and a wrong model is told."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from models.config import GPT
from models.conversion import mapping, read_config, write_config
from parallel.checkpoint.writer import write
from parallel.errors import Mistake
from research.exchange import parity
from research.exchange.gguf import GGUFFile
from research.exchange.parity import our_logits, quiet_transformers, their_auto_logits, their_gguf_logits, their_logits
from tests.research.helpers import gguf_files
from tests.research.helpers.hf_models import CASES, LENGTH, VOCAB, their_folder, their_model

CASE = "llama, grouped"
IDS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return their_folder(tmp_path_factory.mktemp("theirs") / "model", CASE)


def saved(case: str, place: Path) -> tuple[GPT, Path]:
    """(our settings, a checkpoint) of a case."""
    theirs = their_model(case)
    model = read_config.settings(theirs.config)
    weights = mapping.from_hf(model, theirs.config.model_type, theirs.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write(place / "step_000000", shapes, weights.values(), {"step": 0, "samples": 0, "tokens": 0})
    return model, place / "step_000000"


@torch.no_grad()
def expected(case: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of transformers' model that was never in a file, its parameters (not its tables of rotations) rounded."""
    model = their_model(case)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model(IDS).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of a logit over the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_is_the_checkpoint_rounded_and_computed_in_fp32(dtype, tmp_path):
    model, checkpoint = saved(CASE, tmp_path)
    with torch.no_grad():
        found = our_logits(model, checkpoint, dtype)(IDS)
    assert found.dtype == torch.float32 and apart(found, expected(CASE, dtype)) <= 1e-5
    assert dtype == torch.float32 or apart(found, expected(CASE)) > 1e-3


def test_a_way_to_draw_weights_of_the_experiment_s_own_is_not_asked_for(tmp_path):
    """It draws nothing here: every weight is read."""
    model, checkpoint = saved(CASE, tmp_path)
    with torch.no_grad():
        found = our_logits(model.model_copy(update={"init": "variant:Mine"}), checkpoint)(IDS)
    assert apart(found, expected(CASE)) <= 1e-5


@torch.no_grad()
def test_theirs_are_the_files(folder):
    for found in (their_logits(folder, "llama"), their_auto_logits(folder)):
        assert torch.equal(found(IDS), expected(CASE))


@torch.no_grad()
def test_theirs_of_a_gguf_file_are_its_tensors(tmp_path):
    """transformers undoes llama.cpp's order of rows itself, independently of models/conversion/gguf.py."""
    path = gguf_files.write(tmp_path / "m.gguf", CASE)
    with GGUFFile(path) as file:
        assert torch.equal(their_gguf_logits(path, file.config)(IDS), expected(CASE))


SETTINGS = {
    "gpt2": {"norm_eps": 1e-3, "mlp": "relu"},
    "pythia": {"residual": "pre_norm", "rotary_fraction": 0.5, "rotary_base": 9e3, "mlp": "gelu_tanh"},
    "llama, grouped": {"norm_eps": 1e-3, "rotary_base": 9e3, "mlp": "geglu"},
    "llama 3, tied": {"rotary_scaling": "none", "rotary_factor": 7.0, "rotary_original_length": 32},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_model_of_any_other_settings_fails_the_bound(case, tmp_path):
    """A wrong model is told from a right one, setting by setting; the right one passes."""
    model, checkpoint = saved(case, tmp_path)
    theirs = their_model(case)

    def certificate(settings: GPT) -> parity.Certificate:
        return parity.certify(IDS, lambda: lambda ids: theirs(ids).logits, lambda: our_logits(settings, checkpoint))

    assert certificate(model).passed and certificate(model).relative < 1e-5
    for name, value in SETTINGS[case].items():
        changes = {name: value}
        if (name, value) == ("rotary_scaling", "none"):
            changes |= dict.fromkeys(("rotary_factor", "rotary_low_factor", "rotary_high_factor", "rotary_original_length"))
        assert not certificate(model.model_copy(update=changes)).passed, name


def evil(folder: Path, place: Path) -> Path:
    """The model with a program that transformers would run for whoever trusts it."""
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    (place / "modeling_evil.py").write_text("raise SystemExit('the program of a stranger has run')\n")
    table = json.loads((place / "config.json").read_text())
    table["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    (place / "config.json").write_text(json.dumps(table))
    return place


@torch.no_grad()
def test_no_program_of_the_folder_runs(folder, tmp_path):
    place = evil(folder, tmp_path)
    for found in (their_logits(place, "llama"), their_auto_logits(place)):
        assert torch.equal(found(IDS), expected(CASE))
    assert not any("modeling_evil" in name for name in sys.modules)


def test_a_pickle_is_not_opened(folder, tmp_path):
    """Nor where it is all that is there."""

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"model.norm.weight": Harm()}, tmp_path / "pytorch_model.bin")
    for read in (lambda: their_logits(tmp_path, "llama"), lambda: their_auto_logits(tmp_path)):
        with pytest.raises(Mistake, match="transformers cannot read .* → fetch it again"):
            read()
    assert not (tmp_path / "harm").exists()


BROKEN = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "another shape": lambda p: save_file({"model.norm.weight": torch.ones(3)}, p, {"format": "pt"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_they_cannot_read_are_one_sentence(what, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    BROKEN[what](tmp_path / "model.safetensors")
    with pytest.raises(Mistake) as caught:
        their_logits(tmp_path, "llama")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_gguf_file_that_lacks_a_tensor_is_no_model(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", CASE)
    with GGUFFile(path) as file:
        deeper = {**file.config, "num_hidden_layers": 3}
    with pytest.raises(Mistake, match="transformers cannot read .* → fetch it again"):
        their_gguf_logits(path, deeper)


def test_transformers_speaks_as_before_afterwards(capfd):
    """Also after an error; inside it says nothing."""
    before = logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), quiet_transformers():
        assert logging.get_verbosity() > before
        logging.get_logger("transformers").warning("unheard")
        print("unheard", file=sys.stderr)
        raise ZeroDivisionError
    assert logging.get_verbosity() == before and logging.is_progress_bar_enabled()
    assert "unheard" not in capfd.readouterr().err


def test_weights_that_are_not_the_checkpoint_s_are_told(tmp_path):
    model, checkpoint = saved(CASE, tmp_path)
    with pytest.raises(Mistake, match="blocks.0.mlp.up.weight"):
        our_logits(model.model_copy(update={"ffn_size": 48}), checkpoint)


def test_every_family_has_its_class():
    others = {"bert", "megatron-bert", "umt5", "t5"}  # tests/research/exchange/test_bert.py, tests/research/exchange/test_t5.py
    assert set(write_config.ARCHITECTURES) - others == {CASES[case].model_type for case in CASES}
    for case, config in CASES.items():
        assert type(their_model(case)).__name__ == write_config.ARCHITECTURES[config.model_type]
