"""Sweeps of real tiny runs: each trial is trained once, whatever became of the sweep before, and failures are reported."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from research import ROOT
from research.config import serialization
from research.tracking import metrics, run_folder
from research.tracking.run_folder import FINISHED

TINY = [
    "--model.num_layers",
    "1",
    "--model.hidden_size",
    "32",
    "--model.num_heads",
    "2",
    "--model.num_kv_heads",
    "2",
    "--model.ffn_size",
    "64",
    "--model.vocab_size",
    "400",
    "--model.seq_length",
    "32",
    "--data.tokenizer",
    "builtin:bpe-384",
    "--schedule.steps",
    "12",
    "--schedule.batch_size",
    "4",
    "--schedule.micro_batch_size",
    "4",
    "--schedule.validate_every",
    "4",
    "--schedule.validate_tokens",
    "500",
    "--schedule.log_every",
    "1",
    "--optimizer.warmup_steps",
    "2",
    "--checkpoints.every",
    "4",
    "--track.mode",
    "disabled",
]
GRID = ["--grid", "optimizer.lr=1e-3,3e-3"]


def command(runs: Path, *words: str, settings: tuple[str, ...] = ()) -> list[str]:
    shared = [*TINY, "--track.runs", str(runs), *settings]
    return [sys.executable, "-m", "research", "sweep", "experiments/gpt_sotu", "--seeds", "2", *GRID, *words, "--", *shared]


def trained(runs: Path) -> Counter[tuple[float, int]]:
    """How often each (learning rate, seed) has been trained to its end."""
    found = Counter[tuple[float, int]]()
    for folder in run_folder.every(runs):
        experiment = serialization.load(folder.config)
        if run_folder.read_run(folder)["status"] == FINISHED:
            found[experiment.optimizer.lr, experiment.seed] += 1
            steps = [row["progress/step"] for row in metrics.read(folder.metrics) if "train/loss" in row]
            assert steps == list(range(1, 13)), "no step is lost or taken twice"
    return found


@pytest.mark.slow
def test_a_sweep_that_is_killed_and_started_again_trains_each_trial_once(tmp_path: Path) -> None:
    """SIGKILL or SIGTERM at random moments, until the sweep is done; then its result is there without another launch."""
    chance, kills = random.Random(14), 0
    for _ in range(30):
        sweep = subprocess.Popen(command(tmp_path, "--jobs", "2"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = sweep.communicate(timeout=chance.uniform(10, 35))
        except subprocess.TimeoutExpired:
            sweep.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            sweep.communicate(timeout=120)
            kills += 1
            continue
        assert sweep.returncode in (0, 1), said
        if sweep.returncode == 0:
            break
        time.sleep(5)  # a run of the killed sweep may still have been ending
    assert sweep.returncode == 0, said
    assert trained(tmp_path) == {(lr, seed): 1 for lr in (1e-3, 3e-3) for seed in (1, 2)} and kills >= 1
    before = len(run_folder.every(tmp_path))
    again = subprocess.run(command(tmp_path, "--json"), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and len(run_folder.every(tmp_path)) == before
    told = json.loads(again.stdout)
    assert [trial["status"] for trial in told["trials"]] == ["done"] * 4
    assert all(Path(trial["run"]).is_dir() for trial in told["trials"])


@pytest.mark.slow
def test_what_has_failed_is_reported_and_a_second_sweep_is_refused(tmp_path: Path) -> None:
    """A learning rate that breaks the loss stops its run with exit code 3; the others are trained all the same."""
    words = command(tmp_path, settings=("--watch.non_finite", "stop"))
    words[words.index("optimizer.lr=1e-3,3e-3")] = "optimizer.lr=1e-3,1e30"
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("gpt_sotu/sweeps/*.json")):
        assert first.poll() is None
        time.sleep(0.2)
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr and "Traceback" not in second.stderr, second.stderr
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1, said
    assert "optimizer.lr=1e30 seed=1 has failed with exit code 3" in said and "optimizer.lr=1e-3 · " in said
    assert trained(tmp_path) == {(1e-3, 1): 1, (1e-3, 2): 1}


@pytest.mark.slow
def test_ctrl_c_ends_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    sweep = subprocess.Popen(command(tmp_path, "--jobs", "2"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any("train/loss" in row for folder in run_folder.every(tmp_path) for row in metrics.read(folder.metrics)):
        assert sweep.poll() is None
        time.sleep(0.2)
    sweep.send_signal(signal.SIGINT)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + signal.SIGINT and "Traceback" not in said, said
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path) not in process.read_bytes().decode(errors="replace"), process
        except FileNotFoundError:
            continue
    assert os.path.exists(next(tmp_path.glob("gpt_sotu/sweeps/*.json")))
