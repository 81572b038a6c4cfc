"""The verb export: a run that was trained here, as transformers loads it; settings without a counterpart; nothing half-made."""

import json
import os

import pytest
import torch
import transformers

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake
from parallel.grid import Grid
from research.cli import export
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.exchange import parity
from research.generation.restore import DecoderSpec, restored
from research.tracking.run_folder import find_checkpoint
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers.launches import ROOT, Ended


def test_a_run_of_two_ranks_is_what_transformers_loads(tensor_2: Ended, tmp_path, capsys):
    """Its weights, logit by logit; its tokenizer, id by id; no prefix that an unaware reader would miss."""
    run = tensor_2.folder
    export.main([str(run.path), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"export {run.title} · step_000006 · GPT2LMHeadModel · float32" in said and "passed" in said
    assert "left behind: model.init = 'gpt2'" in said
    experiment = serialization.load(run.config)
    ours = restored(DecoderSpec(run.path, checkpoint_folder.latest(run.checkpoints)), Grid())
    words = load_tokenizer(experiment.data, ROOT)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The state of the union — is\n\n strong in 2016."
    assert tokenizer(text).input_ids == words.encode(text) and tokenizer.decode(words.encode(text)) == text
    assert tokenizer.eos_token_id == words.end_of_text == theirs.generation_config.eos_token_id == theirs.config.eos_token_id
    assert tokenizer.model_max_length == experiment.model.seq_length
    ids = torch.tensor([words.encode(text)[:32]])
    with torch.no_grad():
        expected = ours(ids)
        assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["run"] == run.title and certificate["checkpoint"] == "step_000006"
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["certificate.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )


def test_a_checkpoint_may_be_named(tensor_2: Ended, tmp_path):
    checkpoint = tensor_2.folder.checkpoints / "step_000006"
    assert find_checkpoint(str(checkpoint)) == (tensor_2.folder, checkpoint)
    assert find_checkpoint(str(tensor_2.folder.path)) == (tensor_2.folder, checkpoint)
    with pytest.raises(Mistake, match="is a checkpoint outside of a run's folder"):
        export.main([str(save(tmp_path / "checkpoints" / "step_1")), str(tmp_path / "out")])


def test_a_difference_fails_and_leaves_nothing(tensor_2: Ended, tmp_path, monkeypatch):
    right = parity.our_logits
    wrong = lambda model, *more: right(model.model_copy(update={"mlp": "relu"}), *more)  # noqa: E731
    monkeypatch.setattr(parity, "our_logits", wrong)
    with pytest.raises(SystemExit, match="1"):
        export.main([str(tensor_2.folder.path), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_never_overwritten(tensor_2: Ended, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(Mistake, match="out is there already → name a folder that is not"):
        export.main([str(tensor_2.folder.path), str(tmp_path / "out")])
    assert os.listdir(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("500mb", 5 * 10**8), ("1000", 1000)])
def test_sizes(text, size):
    assert export.size_of(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "4 GiB", "", "4.5GB", "9" * 30])
def test_what_is_no_size(text):
    with pytest.raises(Mistake, match="is not a size → write 500MB or 4GB"):
        export.size_of(text)
