"""Real weights: SmolLM2-135M-Instruct's GGUF file, imported, sliced over ranks, with the perplexity and the answer of transformers.

9 heads and 3 kv heads do not fit 2 tensor ranks; they fit 2 stages and 3 tensor ranks.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import gpt
from models.config import GPT
from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.load import load_initial
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import make_engine
from parallel.grid import Grid, make_grid
from research.cli import export
from research.config import serialization
from research.data import token_store, tokenizer_file
from research.data.prepare import HeldOut
from research.data.token_store import TokenStore
from research.data.tokenizer_file import TEMPLATE
from research.exchange import parity
from research.exchange.gguf import GGUFFile
from research.exchange.importer import CERTIFICATE
from research.generation.restore import DecoderSpec, restored
from research.tracking.run_folder import RunFolder
from research.training.periodic import validate
from tests.harness import run_ranks
from tests.models.helpers.build import tensor_grid
from tests.research.helpers.launches import ROOT
from tests.research.helpers.smollm2 import gguf_file

pytestmark = pytest.mark.slow
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2" / "valid.txt"
TOKENS = 2048
PERPLEXITY, WITHIN = 12.97, 0.05
"""Perplexity of the first TOKENS tokens of WikiText-2's validation split in one window; every token but the first is predicted once."""
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="session")
def prefix(smollm2: RunFolder, tmp_path_factory) -> Path:
    """The token store of these tokens, as the run's own tokenizer makes them."""
    if not WIKITEXT.is_file():
        pytest.skip(f"WikiText-2 is not at {WIKITEXT}: it may not lie in the repository")
    words = tokenizer_file.load(serialization.load(smollm2.config).data.tokenizer, Path())
    text = WIKITEXT.read_text(encoding="utf-8")[: 20 * TOKENS]
    ids = np.array(words.encode(text)[:TOKENS])
    found = tmp_path_factory.mktemp("wikitext") / "valid"
    token_store.write(found, [(ids, len(words.decode(ids).encode()))], words.vocab_size, {})
    return found


@pytest.fixture(scope="session")
def their_perplexity(prefix: Path) -> float:
    """The perplexity by transformers, which reads the same file, in fp64 from the logits on."""
    ids = torch.from_numpy(TokenStore(prefix).tokens.astype(np.int64))[None]
    with GGUFFile(gguf_file()) as file, torch.no_grad():
        logits = parity.their_gguf_logits(file.path, file.config)(ids)
    return perplexity(logits, ids)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """e^(mean nats) of each token but the first; logits 'b s v' of the whole vocabulary."""
    logs = logits[:, :-1].double().log_softmax(-1)
    return float(torch.exp(-logs.gather(-1, ids[:, 1:, None]).mean()))


def facts(run: RunFolder) -> tuple[dict, str]:
    return serialization.load(run.config).model.model_dump(), str(checkpoint_folder.latest(run.checkpoints))


def test_the_certificate_of_a_real_model_is_far_inside_its_bound(smollm2: RunFolder) -> None:
    found = json.loads((smollm2.path / CERTIFICATE).read_text())
    assert found["passed"] and found["relative"] < 1e-5 and found["kl"] < 1e-9
    assert found["perplexity_ours"] == pytest.approx(found["perplexity_theirs"], rel=1e-6)


def perplexity_of_an_engine(settings: dict, folder: str, prefix: str, pipe: int) -> tuple[float, int]:
    """(perplexity, parameters of this rank) by the engine that trains, its weights read as a run that begins with them reads them."""
    model, grid = GPT(**settings), make_grid(pipe, 1)
    derived = EngineSettings(
        precision="fp32", micro_batch_size=1, micro_batches=2, clip=1.0, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
        zero_stage=1,
    )  # fmt: skip
    loss = gpt.TokenLoss(model.vocab_size, 0.0, grid.tensor_group)
    engine = make_engine(gpt.layers(model, grid, seed=3), loss, grid, derived)
    load_initial(Path(folder), engine)
    store = TokenStore(Path(prefix))
    found = validate(engine, HeldOut(store, store.num_tokens - 1, store.num_bytes), TOKENS - 1, end_of_text=0)
    assert found is not None
    return found.perplexity, sum(parameter.numel() for parameter in engine.parameters.values())


def test_two_stages_have_the_perplexity_of_transformers(smollm2: RunFolder, prefix: Path, their_perplexity: float) -> None:
    settings, folder = facts(smollm2)
    ranks = run_ranks(perplexity_of_an_engine, 2, settings, folder, str(prefix), 2, timeout=900.0)
    (first, held), (second, other) = ranks
    assert first == second == pytest.approx(their_perplexity, rel=1e-5)
    assert first == pytest.approx(PERPLEXITY, abs=WITHIN)
    assert held + other == 134_515_008 + 49_152 * 576 and max(held, other) < 0.6 * (held + other)  # the tied table is on both


def logits_of_tensor_ranks(run: str, folder: str, prefix: str) -> np.ndarray:
    """'b s v' of this rank's rows of the vocabulary, as generate restores a model."""
    grid = tensor_grid()
    module = restored(DecoderSpec(Path(run), Path(folder)), grid)
    ids = torch.from_numpy(TokenStore(Path(prefix)).tokens.astype(np.int64))[None]
    with torch.no_grad():
        return module(ids).numpy()


def test_three_tensor_ranks_have_the_perplexity_of_transformers(smollm2: RunFolder, prefix: Path, their_perplexity: float) -> None:
    _, folder = facts(smollm2)
    ranks = run_ranks(logits_of_tensor_ranks, 3, str(smollm2.path), folder, str(prefix), timeout=900.0)
    assert {part.shape for part in ranks} == {(1, TOKENS, 49_152 // 3)}
    ids = torch.from_numpy(TokenStore(prefix).tokens.astype(np.int64))[None]
    found = perplexity(torch.cat([torch.from_numpy(part) for part in ranks], dim=-1), ids)
    assert found == pytest.approx(their_perplexity, rel=1e-5) and found == pytest.approx(PERPLEXITY, abs=WITHIN)


def asked(run: RunFolder) -> str:
    """The question as the run's chat template has it, rendered by transformers."""
    theirs = AutoTokenizer.from_pretrained(run.path / "tokenizer")
    assert theirs.chat_template == (run.path / "tokenizer" / TEMPLATE).read_text(encoding="utf-8")
    return theirs.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("tensor", [1, 3])
def test_it_knows_the_capital_of_france(tensor: int, smollm2: RunFolder) -> None:
    """As a person asks on a command line, with greedy sampling."""
    options = ["--prompt", asked(smollm2), "--max_new_tokens", "12", "--tensor", str(tensor), "--json"]
    command = [sys.executable, "-m", "research", "generate", str(smollm2.path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in json.loads(done.stdout)["text"]


def test_with_its_markers_as_tokens_it_answers_and_stops(smollm2: RunFolder) -> None:
    """As in its training, <|im_start|> is one token. In a prompt of `generate`, markers are ordinary text."""
    words = AutoTokenizer.from_pretrained(smollm2.path / "tokenizer")
    ids = words(asked(smollm2), return_tensors="pt").input_ids
    asked_for = ids.shape[1]
    module = restored(DecoderSpec(smollm2.path, checkpoint_folder.latest(smollm2.checkpoints)), Grid())
    while ids[0, -1] != words.eos_token_id or ids.shape[1] == asked_for:
        assert ids.shape[1] < asked_for + 20
        with torch.no_grad():
            ids = torch.cat([ids, module(ids)[:, -1:].argmax(-1)], dim=1)
    assert "Paris" in words.decode(ids[0, asked_for:])


def test_two_tensor_ranks_are_refused_with_what_works(smollm2: RunFolder) -> None:
    launcher = smollm2.path.parents[2] / "tree" / "experiments" / "smollm2" / "launch.py"
    command = [sys.executable, str(launcher), "--parallel.tensor", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error  parallel.tensor = 2 does not divide model.num_heads = 9 → use 1 or 3, or parallel.pipe = 2\n"


def test_it_is_trained_further_from_its_weights(smollm2: RunFolder, tmp_path: Path) -> None:
    """Two steps on short windows of the experiment that the import made: the first loss is that of a trained model."""
    folder = smollm2.path.parents[2] / "tree" / "experiments" / "smollm2"
    assert subprocess.run([sys.executable, str(folder / "launch.py"), "--dry-run"], capture_output=True, timeout=60).returncode == 0

    short = ["--model.seq_length", "64", "--schedule.batch_size", "2", "--schedule.steps", "2", "--optimizer.warmup_steps", "0"]
    (tmp_path / "text.txt").write_text("The capital of France is Paris, which lies on the river Seine. It is a large city.\n" * 20)
    (tmp_path / "held_out.txt").write_text("The capital of Italy is Rome, which lies on the river Tiber. It is a large city.\n" * 20)
    text = ["--data.train", str(tmp_path / "text.txt"), "--data.validation", str(tmp_path / "held_out.txt")]
    quick = [*text, "--schedule.log_every", "1", "--track.mode", "disabled"]
    command = [sys.executable, str(folder / "launch.py"), *short, *quick]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in smollm2.path.parent.iterdir() if path.is_dir() and not path.is_symlink() and path != smollm2.path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2 and all(loss < 5 for loss in losses)  # log 49,152 = 10.8 where nothing was read


def test_exported_it_answers_through_transformers_alone(smollm2: RunFolder, tmp_path) -> None:
    """GGUF → ours → a Hugging Face folder in bfloat16: model, tokenizer, chat template and generation settings by the folder alone."""
    export.main([str(smollm2.path), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["passed"]
    words, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": QUESTION}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    answer = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in words.decode(answer) and int(answer[-1]) == model.generation_config.eos_token_id  # it stops by itself
