"""Errors that launch.py reports before it imports torch, in real processes: rank 0 prints one sentence and exits with code 2 at once.

A rank that no launcher ends prints it later.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cluster.exit_codes import refuse

LAUNCH = ROOT / "experiments/gpt_sotu/launch.py"
NOT_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_", "OMPI_", "MASTER_", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
RANK_1 = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
IMPORTS = "-X", "importtime"
Done = subprocess.CompletedProcess[str]


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)} | more


def launch(*argv: str, file: Path = LAUNCH, cwd: Path = ROOT, flags: tuple[str, ...] = (), **environ: str) -> Done:
    command = [sys.executable, *flags, str(file), *argv]
    return subprocess.run(command, cwd=cwd, env=environment(**environ), capture_output=True, text=True, timeout=60)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.num_head", "3"], "model.num_head is not a setting → did you mean model.num_heads?"),
        (["--parallel.tensor", "2"], "parallel.pipe × parallel.tensor = 1 × 2 = 2 needs 2 ranks, the world has 1 → launch with"),
        (["--model.vocab_size", "8"], "model.vocab_size = 8 has no room for"),
        slow(["--parallel.tensor", "5"], "parallel.tensor = 5 does not divide model.num_heads = 6 → use 1, 2, 3 or 6"),
        slow(["--data.train", "no.txt"], "data.train = 'no.txt'"),
        slow(["--model.norm", "variant:Mine"], "model.norm = 'variant:Mine' but"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], said: str, tmp_path: Path) -> None:
    done = launch("--local_rank=0", *argv, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error  {said}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "experiments/mine"
    shutil.copytree(LAUNCH.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.py").write_text((folder / "config.py").read_text().replace("num_heads=6", "num_head=6", 1))
    for package in ("research", "models", "parallel"):
        (tmp_path / package).symlink_to(ROOT / package)
    done = launch(file=folder / "launch.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error  experiments/mine/config.py:")
    assert done.stderr.endswith(": model.num_head is not a setting → did you mean model.num_heads?\n")


@pytest.mark.parametrize("argv", [["--dry-run"], slow(["--model.num_head", "3"]), slow(["--help"])])
def test_torch_is_not_imported(argv: list[str]) -> None:
    imported = {line.rpartition("|")[2].strip() for line in launch(*argv, flags=IMPORTS).stderr.splitlines()}
    assert "research.launch" in imported
    assert not imported & {"torch", "deepspeed", "transformers", "wandb", "tokenizers"}


def test_it_is_refused_within_two_seconds() -> None:
    """Within half a second on an idle machine. On a busy one, one of three attempts is enough."""
    times = []
    while len(times) < 3 and min(times, default=2) >= 2:
        start = time.monotonic()
        assert launch("--model.num_head", "3").returncode == 2
        times.append(time.monotonic() - start)
    assert min(times) < 2


@pytest.mark.slow
def test_rank_1_leaves_the_error_message_to_rank_0() -> None:
    command = [sys.executable, str(LAUNCH), "--local_rank=1", "--model.num_head", "3"]
    process = subprocess.Popen(command, env=environment(**RANK_1), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2.5)  # rank 0 takes half a second
    process.terminate()  # as the launcher does once rank 0 has exited
    assert process.communicate(timeout=20) == (b"", b"")


def test_a_rank_that_no_launcher_ends_prints_it_in_the_end(capsys) -> None:
    start = time.monotonic()
    with pytest.raises(SystemExit) as left:
        refuse(Mistake("a = 1 → use 2"), rank=3, patience=0.2)
    assert left.value.code == 2
    assert time.monotonic() - start >= 0.2
    assert capsys.readouterr() == ("", "error  (rank 3) a = 1 → use 2\n")


def test_dry_run_shows_the_arithmetic(tmp_path: Path) -> None:
    done = launch("--dry-run", "--parallel.zero-stage", "0", "--schedule.batch_size", "32", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert lines["config"] == "experiments/gpt_sotu + 2 overrides: parallel.zero_stage 1 → 0, schedule.batch_size 16 → 32"
    assert lines["layout"] == "pipe 1 × data 1 × tensor 1 · ZeRO-1 · fp32 · zero_stage 0 always runs as 1"
    assert lines["batch"] == "32 sequences = 8 micro × 4 accumulated × 1 data · 4,096 tokens a step"
    assert lines["model"].endswith("6 heads · 3.4 M parameters")
    assert lines["schedule.batch_size"] == "32"
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_shows_a_dry_run() -> None:
    done = launch("--local_rank=1", "--dry-run", **RANK_1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_ranks_are_described_as_two() -> None:
    done = launch("--local_rank=0", "--dry-run", "--parallel.tensor", "2", **(RANK_1 | {"RANK": "0", "LOCAL_RANK": "0"}))
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert lines["machine"].startswith("1 node × 2 ranks · ")
    assert lines["layout"] == "pipe 1 × data 1 × tensor 2 · ZeRO-1 · fp32"
    assert lines["model"].endswith("3.4 M parameters (1.7 M on each rank)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        slow("--parallel.sequence", "pipe 1 × data 1 × tensor 2 · sequence parallel · ZeRO-1 · fp32"),
        slow("--parallel.recompute selective", "pipe 1 × data 1 × tensor 2 · ZeRO-1 · selective recomputation · fp32"),
        (
            "--parallel.sequence --parallel.zero_stage 2 --parallel.offload_optimizer --parallel.recompute full",
            "pipe 1 × data 1 × tensor 2 · sequence parallel · ZeRO-2 · optimizer in host memory · full recomputation · fp32",
        ),
    ],
)
def test_what_the_layout_line_says(arguments: str, said: str) -> None:
    rank_0 = RANK_1 | {"RANK": "0", "LOCAL_RANK": "0"}
    done = launch("--local_rank=0", "--dry-run", "--parallel.tensor", "2", *arguments.split(), **rank_0)
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)["layout"] == said


def test_help_needs_no_layout_that_works(tmp_path: Path) -> None:
    """`python launch.py --help` works even if the experiment itself needs four ranks."""
    folder = tmp_path / "experiments/wide"
    shutil.copytree(LAUNCH.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.py").write_text((folder / "config.py").read_text().replace("tensor=1, pipe=1", "tensor=2, pipe=2"))
    for package in ("research", "models", "parallel"):
        (tmp_path / package).symlink_to(ROOT / package)
    done = launch("--help", file=folder / "launch.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "start it, from any folder" in done.stdout


def test_every_launch_file_is_the_same() -> None:
    texts = {path.read_bytes() for path in ROOT.glob("experiments/*/launch.py")}
    assert len(texts) == 1
