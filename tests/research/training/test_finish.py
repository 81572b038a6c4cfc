"""The text at the end of a run is what `generate` writes after the same prompt, and what is proposed next is there."""

from types import SimpleNamespace

import pytest

from parallel.errors import Mistake
from research import __main__ as research_main
from research.config import schema, serialization
from research.data.run_tokenizer import load_tokenizer
from research.tracking import run_folder
from research.training import finish
from tests.research.helpers import untrained
from tests.research.helpers.example import bert, example


@pytest.mark.parametrize(("precision", "temperature"), [("fp32", 0.0), ("bf16", 0.0), ("fp32", 0.8)])
def test_it_is_what_generate_writes(precision, temperature, tmp_path, capfd):
    folder = untrained.make(tmp_path, precision=precision)
    experiment = serialization.load(folder.config)
    experiment.sample = schema.Sample(temperature=temperature, seed=7)
    text = finish.write(folder, experiment, load_tokenizer(experiment.data, tmp_path), "the people")
    asked = ["--prompt", "the people", "--temperature", str(temperature), "--seed", "7"]
    assert research_main.main(["generate", str(folder.path), *asked]) == 0
    written = capfd.readouterr().out
    assert written.removeprefix("the people").rstrip("\n") == text.text.rstrip("\n") and len(text.text) > 10


def test_it_fits_into_a_short_context(tmp_path):
    """Forty tokens are asked for, and as many are written as there is room for."""
    folder = untrained.make(tmp_path, seq_length=8)
    experiment = serialization.load(folder.config)
    tokenizer = load_tokenizer(experiment.data, tmp_path)
    assert len(tokenizer.encode(finish.write(folder, experiment, tokenizer, "").text)) <= 3 * 7
    with pytest.raises(Mistake, match="shorten the prompt"):
        finish.write(folder, experiment, tokenizer, "the people of the union, " * 9)


def test_a_large_model_is_left_alone(tmp_path, monkeypatch):
    folder = untrained.make(tmp_path)
    experiment = serialization.load(folder.config)
    monkeypatch.setattr(finish, "ROOM", 10**9)
    with pytest.raises(Mistake, match="large for this machine's free memory → `python -m research generate` on another"):
        finish.write(folder, experiment, load_tokenizer(experiment.data, tmp_path), "the people")


def test_next_names_only_what_there_is(tmp_path, monkeypatch):
    """No dashboard without a W&B record, even if W&B's folder is there, and nothing to generate with without a checkpoint."""
    monkeypatch.setattr(finish, "first_prompt", lambda experiment, corpus: "the people")
    folder = run_folder.create(tmp_path, "gpt")
    folder.wandb.mkdir()
    shown: list[str] = []
    console, job = SimpleNamespace(next=lambda commands, first: shown.extend(commands)), SimpleNamespace(experiment=example())
    run = SimpleNamespace(folder=folder, corpus=None, console=console, job=job)
    finish.show_next_commands(run)
    assert shown == ["python -m research runs"]

    for path in (folder.checkpoints / "step_000003" / "manifest.json", folder.wandb / "offline-run-1-a" / "run-a.wandb"):
        path.parent.mkdir(parents=True)
        path.touch()
    shown.clear()
    finish.show_next_commands(run)
    assert [command.split()[0:4] for command in shown] == [
        ["python", "-m", "research", "generate"], ["wandb", "leet", f"{folder.path}/wandb"], ["python", "-m", "research", "runs"]
    ]  # fmt: skip

    job.experiment = bert()
    shown.clear()
    finish.show_next_commands(run)
    assert [command.split()[0] for command in shown] == ["wandb", "python"]
