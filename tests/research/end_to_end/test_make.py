"""The Makefile's command for the machine, and programs that are started with the wrong Python, in the wrong place or with wrong numbers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from research import ROOT

Done = subprocess.CompletedProcess[str]


def finished(*command: str, cwd: Path = ROOT) -> Done:
    """The ended process. `make test` runs these tests, so its own variables are taken out: a make below another one says so."""
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, timeout=120)


@pytest.mark.parametrize(("gpus", "ranks", "prefix"), [(0, 2, "DS_ACCELERATOR=cpu "), (1, 1, ""), (2, 2, ""), (8, 2, "")])
def test_make_train_starts_two_ranks_unless_there_is_one_gpu(gpus: int, ranks: int, prefix: str) -> None:
    """-o: .venv is taken as it is. -n prints the command."""
    done = finished("make", "-n", "-o", ".venv/ready", "train", f"GPUS={gpus}")
    command = done.stdout.replace("\\\n", "").split()
    expected = f"{prefix}deepspeed --quiet --num_gpus {ranks} experiments/gpt_sotu/launch.py --parallel.tensor {ranks}"
    assert command == expected.split(), done.stderr


@pytest.mark.slow
def test_make_train_counts_the_gpus_that_torch_sees() -> None:
    import torch

    gpus = torch.accelerator.device_count()
    counted = finished("make", "-n", "-o", ".venv/ready", "train").stdout
    assert counted == finished("make", "-n", "-o", ".venv/ready", "train", f"GPUS={gpus}").stdout


@pytest.mark.parametrize("command", [["experiments/gpt_sotu/launch.py", "--dry-run"], ["-m", "research", "runs"]])
def test_a_python_without_the_packages_says_how_to_get_them(command: list[str]) -> None:
    """-S: without site-packages, as the system's Python is where .venv is not active."""
    done = finished(sys.executable, "-S", *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error  this Python has no package ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" → source .venv/bin/activate, or pip install -r requirements.txt\n")


def test_a_python_without_the_packages_still_says_which_code_this_is() -> None:
    done = finished(sys.executable, "-S", "-m", "research", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" · torch – · deepspeed –\n")


def test_an_experiment_outside_of_the_tree(tmp_path) -> None:
    shutil.copytree(ROOT / "experiments/gpt_sotu", tmp_path / "mine")
    done = finished(sys.executable, "-S", "mine/launch.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error  mine does not lie in Tessera's folder experiments → move it there\n".replace(
        "mine", str(tmp_path / "mine")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("checkpoint.py --ranks 0", "argument --ranks: '0' is not a whole number from 1"),
        ("checkpoint.py --hidden 511 --tensor 2", "error  --tensor 2 does not fit --ranks 1 and 1 heads → use 1"),
        ("checkpoint.py --folder /nonexistent", "cannot be used (No such file or directory)"),
        ("dropout.py --p 2", "argument --p: '2' is not a number from 0 and below 1"),
        ("generate.py --prompt 999", "error  --prompt 999 and --tokens 128 are more than 512 together → use fewer"),
        ("sample.py nothing", "error  nothing has no config.py"),
        ("sample.py --tensor 5", "error  parallel.tensor = 5 does not divide model.num_heads = 6"),
        ("serve.py nothing --clients 1", "error  there is no run"),
        ("train.py --threads 0", "argument --threads: '0' is not a whole number from 1"),
    ],
)
def test_a_benchmark_with_arguments_that_cannot_work(command: str, said: str) -> None:
    done = finished(sys.executable, *f"benchmarks/{command}".split())
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
