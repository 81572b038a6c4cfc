"""There and back through files: transformers → ours → transformers, bit for bit, and the same logits on 1, 2 and 4 tensor ranks."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models import gpt
from models.config import GPT
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader, load_weights
from parallel.layers import PlainModule
from research.cli import export
from research.config import serialization
from research.exchange import source
from research.tracking.run_folder import RunFolder
from tests.harness import run_ranks
from tests.models.helpers.build import tensor_grid
from tests.research.helpers.hf_models import CASES, LENGTH, VOCAB, imported, their_folder, their_model, tree

TOLERANCE = 1e-5
SHARDED = {"pythia": "60KB", "llama 3, tied": "80KB"}


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """there(case): (transformers' folder, our run), once."""
    place = tmp_path_factory.mktemp("exchange")
    tree(place)

    @functools.cache
    def make(case: str) -> tuple[Path, RunFolder]:
        name = case.replace(" ", "_").replace(",", "")
        folder = their_folder(place / name, case, **({"max_shard_size": SHARDED[case]} if case in SHARDED else {}))
        return folder, imported(folder, place, name)

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


SLOW = ("gpt2, untied, n_inner", "llama, grouped", "llama, biases of attention", "neox, no biases of attention")
"""Cases of which every setting occurs in another case or in tests/models/conversion/test_mapping.py."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def test_there_and_back_is_the_same_to_the_bit(case, there, tmp_path, capsys):
    """Files, logits and token ids of what is loaded by the folder alone; both ways the certificate passes."""
    folder, run = there(case)
    sizes = ["--shard-size", SHARDED[case]] if case in SHARDED else []
    export.main([str(run.path), str(tmp_path / "back"), *sizes])
    assert "parity   passed · " in capsys.readouterr().out
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) and tensor.dtype == torch.float32 for name, tensor in after.items())
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (case in SHARDED)

    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(back(ids()).logits, their_model(case)(ids()).logits)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "back"))
    text = "We, the people — of 1787\n\n  and <|end|> after."
    assert ours(text).input_ids == theirs(text).input_ids and ours.eos_token_id == theirs.eos_token_id == 0
    assert ours.decode(ours(text).input_ids) == text
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert (generation.eos_token_id, generation.bos_token_id) == (0, 0)


def logits_on_this_rank(jobs: list[tuple[dict, str]]) -> list:
    grid = tensor_grid()
    found = []
    for settings, checkpoint in jobs:
        module = PlainModule(gpt.layers(GPT(**settings), grid, seed=9))
        with Reader(Path(checkpoint)) as reader:
            load_weights(module, reader, grid)
        with torch.no_grad():
            found.append(module.eval()(ids()).numpy())
    return found


@pytest.mark.parametrize("tensor", [pytest.param(degree, marks=pytest.mark.slow) for degree in (1, 2, 4)])
def test_an_imported_model_has_transformers_logits_on_every_degree(tensor, there):
    """Largest difference of a logit ≤ 1e-5 of the largest logit, fp32, read from the run's folder by each rank."""
    runs = {case: there(case)[1] for case in CASES}
    jobs = [(serialization.load(run.config).model.model_dump(), str(latest(run.checkpoints))) for run in runs.values()]
    ranks = run_ranks(logits_on_this_rank, tensor, jobs)
    for i, case in enumerate(CASES):
        found = torch.cat([torch.from_numpy(rank[i]) for rank in ranks], dim=-1)[..., :VOCAB]
        with torch.no_grad():
            true = their_model(case)(ids()).logits
        assert (found - true).abs().max() <= TOLERANCE * true.abs().max(), case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_widened_and_rounded_back_to_the_bit(dtype, tmp_path):
    folder = their_folder(tmp_path / "half", "llama, grouped", dtype)
    run = imported(folder, tmp_path, "half")
    with Reader(latest(run.checkpoints)) as reader:
        found = reader.read("blocks.1.mlp.down.weight")
    assert found.dtype == torch.float32 and torch.equal(found, tensors(folder)["model.layers.1.mlp.down_proj.weight"].float())
    name = str(dtype).removeprefix("torch.")
    export.main([str(run.path), str(tmp_path / "back"), "--dtype", name])
    after = tensors(tmp_path / "back")
    assert all(torch.equal(tensor, after[key]) and after[key].dtype == dtype for key, tensor in tensors(folder).items())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == dtype
    assert json.loads((tmp_path / "back" / "certificate.json").read_text())["dtype"] == name


def test_a_view_holds_nothing_but_what_was_named(tmp_path):
    """Tables are written anew: without the byte-order mark, which transformers does not read, and without names of programs."""
    for name in ("model.safetensors", "modeling_evil.py", "adapter_config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 0.1, "auto_map": {"AutoConfig": "modeling_evil.Config"}}')
    with source.private_view([tmp_path / "config.json", tmp_path / "model.safetensors"], {}) as folder:
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
        assert json.loads((folder / "config.json").read_text()) == {"a": 0.1}
        assert (folder / "model.safetensors").resolve() == (tmp_path / "model.safetensors").resolve()
    assert not folder.exists() and (tmp_path / "config.json").exists()
