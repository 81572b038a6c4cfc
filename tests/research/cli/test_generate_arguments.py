"""The command line of `generate`: its defaults, its options, and every error in one sentence, before torch."""

import subprocess
import sys

import pytest

from research.cli.generate import Task, parser, prepared
from research.config import checks
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained
from tests.research.helpers.example import example, sentence
from tests.research.helpers.launches import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("task"), steps=(3, 6))


@pytest.fixture(scope="module")
def rotary(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("rotary"), **ROTARY)


def task(folder: RunFolder, *words: str) -> Task:
    return prepared(parser().parse_args([str(folder.path), *words]))


def test_defaults(folder):
    command = task(folder, "--prompt", "the people")
    settings = command.settings("the people")
    length = len(command.tokenizer.prompt("the people"))
    assert command.checkpoint.name == "step_000006" and command.context == 32
    assert (settings.max_new_tokens, settings.sampling.greedy, settings.stops, settings.logprobs) == (32 - length, True, (), None)
    assert (command.slots, command.cache_length) == (1, 32)


def test_options(folder):
    words = ["--prompt", "war", "--prompt", "peace", "--n", "3", "--temperature", "0.7", "--top-k", "5", "--top_p=0.9", "--min-p=0.1"]
    more = ["--repetition-penalty", "1.2", "--stop", "a", "--stop", "b c", "--seed", "9", "--logprobs", "2", "--max-new-tokens", "4"]
    command = task(folder, *words, *more, "--checkpoint", "3", "--batch", "4")
    settings = command.settings("war", 1, 2)
    sampling = settings.sampling
    assert command.checkpoint.name == "step_000003" and command.prompts == ("war", "peace") and command.slots == 4
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.7, 5, 0.9, 0.1)
    assert (sampling.repetition_penalty, settings.stops, settings.logprobs, settings.max_new_tokens) == (1.2, ("a", "b c"), 2, 4)
    assert len({command.settings("war", k, i).seed for k in range(3) for i in range(3)}) == 9
    assert command.cache_length == max(len(command.tokenizer.prompt(prompt)) for prompt in ("war", "peace")) + 4


def test_context(rotary):
    assert task(rotary, "--prompt", "war", "--context", "100", "--max_new_tokens", "90").context == 100
    assert task(rotary, "--interactive", "--context", "100").cache_length == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to continue → give one of --prompt TEXT, --file FILE, --fim PREFIX SUFFIX and --interactive"),
        (["--prompt", "a", "--interactive"], "--prompt and --interactive are given → give one of"),
        (["--interactive", "--json"], "--interactive does not go with --json"),
        (["--prompt", "a", "--n", "0"], "--n 0 does not work → use 1 or more"),
        (["--prompt", "a", "--beams", "0"], "--beams 0 does not work"),
        (["--prompt", "a", "--batch", "0"], "--batch 0 does not work"),
        (["--prompt", "a", "--n", "2"], "--n 2 greedy texts are all the same → add --temperature 1, or --beams 2"),
        (["--prompt", "a", "--beams", "2", "--temperature", "1"], "--temperature does not go with --beams 2"),
        (["--prompt", "a", "--beams", "2", "--stop", "x"], "--stop does not go with --beams 2"),
        (["--prompt", "a", "--beams", "2", "--logprobs", "1"], "--logprobs does not go with --beams 2"),
        (["--prompt", "a", "--beams", "2", "--n", "3"], "--n 3 is more than --beams 2 find → use --beams 3, or --n 2"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0 does not work"),
        (["--prompt", "a", "--top_p", "0.5"], "top_p = 0.5 has no effect at temperature = 0"),
        (["--prompt", "a", "--tensor", "3"], "--tensor 3 does not fit model.num_heads = 4, num_kv_heads = 4 and ffn_size = 48 → use 1, 2"),
        (["--prompt", "a", "--tensor", "0"], "--tensor 0 does not fit"),
        (["--prompt", "a", "--checkpoint", "4"], "has no checkpoint of step 4 → it has 3 and 6"),
        (["--prompt", "a", "--context", "33"], "context = 33 is longer than the positions learned, model.seq_length = 32"),
        (["--prompt", "a", "--context", "1"], "context = 1 does not work"),
        (["--prompt", "a", "--max_new_tokens", "32"], "needs 33 places, the context has 32 and does not slide → use max_new_tokens 31"),
        (["--prompt", "a " * 100], "does not slide → shorten the prompt"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens = 0 does not work"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", "--logprobs", "-1"], "logprobs = -1 does not work"),
        (["--prompt", "\udcff"], "is not UTF-8"),
        (["--file", "/nowhere.txt"], "--file /nowhere.txt cannot be read"),
        (["--prompt", "a", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--prompt", "a", "--top_k", "x"], "argument --top_k: invalid int value: 'x'"),
        (["--prompt", "a", "--tokens", "5"], "does not know --tokens"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(words, message, folder):
    assert message in sentence(lambda: task(folder, *words))


def test_an_unknown_run_is_said(tmp_path):
    assert "there is no run folder nothing" in sentence(lambda: prepared(parser().parse_args(["nothing", "--prompt", "a"])))


def test_a_launcher_is_not_needed(folder, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert "generate starts its ranks itself" in sentence(lambda: task(folder, "--prompt", "a"))


def test_the_command_is_checked_without_torch(folder):
    code = f"""
import sys
from research.cli.generate import parser, prepared
prepared(parser().parse_args([{str(folder.path)!r}, '--prompt', 'a']))
sys.exit('torch' in sys.modules and 'torch was imported')"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_help_explains_the_options():
    text = " ".join(parser().format_help().split())
    assert all(words in text for words in ("the likeliest", "Ctrl-D", "JSON lines", "up to rounding", "--max_new_tokens", "--min_p"))


def test_tensor_degrees_are_those_that_training_accepts():
    assert checks.tensor_degrees(example(model=dict(num_heads=6, num_kv_heads=6)).model) == [1, 2, 3, 6]
    assert checks.tensor_degrees(example(model=dict(num_heads=6, num_kv_heads=2)).model) == [1, 2]  # 32 features, 3 sharers
