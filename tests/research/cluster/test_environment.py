"""Ranks from what each launcher really sets; a shell inside a Slurm job is not a step of it."""

import os
import subprocess

import pytest

from research import ROOT
from research.cluster.environment import (
    ALONE,
    Ranks,
    activate_command,
    find_ranks,
    first_host,
    git_state,
    kept_alive_by_ssh,
    rank_hint,
    refuse_shared_accelerators,
    tasks_per_node,
    threads_asked_for,
    threads_per_rank,
)
from research.cluster.software import versions
from tests.research.helpers.example import sentence

DEEPSPEED = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {name: value for name, value in DEEPSPEED.items() if name not in ("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")} | {
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}
JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "6",
    "SLURM_JOB_NODELIST": "gpu[007-009]",
    "SLURM_NNODES": "3",
    "SLURM_TASKS_PER_NODE": "2(x3)",
}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[008-009],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_nothing_set_is_a_world_of_one() -> None:
    assert find_ranks({}) == ALONE == Ranks(0, 0, 1, 1, "python", "127.0.0.1", 0)


def test_deepspeed_and_torchrun() -> None:
    assert find_ranks(DEEPSPEED) == Ranks(5, 1, 8, 4, "deepspeed", "10.0.0.1", 29500)
    assert find_ranks(TORCHRUN) == Ranks(5, 1, 8, 4, "torchrun", "10.0.0.1", 29500)


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    assert find_ranks(STEP | TORCHRUN).launcher == "torchrun"


def test_srun() -> None:
    ranks = find_ranks(STEP)
    assert (ranks.rank, ranks.local_rank, ranks.world, ranks.local_world) == (4, 0, 5, 1)
    assert (ranks.launcher, ranks.master_addr) == ("srun", "gpu008")
    assert 1024 < ranks.master_port < 32768


def test_srun_ranks_agree_on_where_to_meet() -> None:
    places = set()
    for rank, (local, node) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]):
        ranks = find_ranks(STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)})
        assert (ranks.rank, ranks.local_rank, ranks.local_world) == (rank, local, 1 if node == 2 else 2)
        places.add((ranks.master_addr, ranks.master_port))
    assert len(places) == 1


def test_srun_with_the_fewest_variables() -> None:
    few = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "node3"}
    assert find_ranks(few | {"SLURM_JOB_ID": "7"}).world == 2
    first, second = find_ranks(few | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}), find_ranks(few)
    assert (first.rank, second.rank, first.local_world, first.master_addr) == (0, 1, 2, "node3")
    assert first.master_port == second.master_port


def test_two_jobs_and_two_steps_meet_in_different_places() -> None:
    ports = {find_ranks(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port for job in (1, 2, 3) for step in (0, 1)}
    assert len(ports) == 6


def test_an_address_that_was_set_is_respected() -> None:
    ranks = find_ranks(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (ranks.master_addr, ranks.master_port) == ("head", 1234)


@pytest.mark.parametrize(
    "environ",
    [
        JOB,  # the shell of salloc
        JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a batch script
        JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": str(0xFFFFFFFB)},  # a batch script, numbered
        JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "1"},  # salloc's
    ],
)
def test_a_shell_inside_a_slurm_job_is_a_world_of_one(environ: dict[str, str]) -> None:
    assert find_ranks(environ) == ALONE


def test_a_shell_from_srun_pty_is_a_world_of_one() -> None:
    environ = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert find_ranks(environ).world == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "the launcher set RANK but not LOCAL_RANK"),
        (DEEPSPEED | {"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment is not a whole number"),
        (DEEPSPEED | {"RANK": "8"}, "deepspeed set rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "torchrun set rank 5 of 8, local rank 4 of 4"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun has set no RANK"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "Slurm's tasks per node = 'many'"),
    ],
)
def test_a_broken_environment_is_a_sentence(environ: dict[str, str], said: str) -> None:
    assert sentence(lambda: find_ranks(environ)).startswith(said)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a,b", "a"), ("n[003-006,9],x", "n003"), ("n[9,12]", "n9"), ("r[1-2]n[3-4].hpc", "r1n3.hpc"), ("a-b-1,c", "a-b-1")],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_threads_share_the_cores_we_may_use() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(ALONE, {}) == cores
    assert threads_per_rank(Ranks(0, 0, cores, cores, "deepspeed", "a", 1), {}) == 1
    assert threads_per_rank(Ranks(0, 0, 999, 999, "deepspeed", "a", 1), {}) == 1


def test_cores_that_slurm_bound_to_this_task_are_not_shared_again() -> None:
    ranks = find_ranks(STEP | {"SLURM_CPUS_PER_TASK": "1"})
    assert threads_per_rank(ranks, {}) == 1
    assert find_ranks(STEP | {"SLURM_CPUS_PER_TASK": "3"}).cores == 3


def test_rank_hint_never_raises() -> None:
    assert [rank_hint(e) for e in ({}, {"RANK": "3"}, {"SLURM_PROCID": "2"}, {"RANK": "x"})] == [0, 3, 2, 0]


def test_git_state(tmp_path, monkeypatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) == ("unknown", False)
    git("init")
    assert git_state(tmp_path) == ("unknown", False)
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    commit, dirty = git_state(tmp_path)
    assert len(commit) >= 7 and not dirty
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == (commit, True)
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") == ("unknown", False)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == ("unknown", False)


@pytest.mark.parametrize(("text", "threads"), [("1", 1), ("3", 3), (" 4,2", 4), ("1024", 1024)])
def test_omp_num_threads_is_honoured_before_cores_and_launchers(text: str, threads: int) -> None:
    environ = {"OMP_NUM_THREADS": text}
    assert threads_per_rank(ALONE, environ) == threads_per_rank(Ranks(0, 0, 9, 9, "srun", "a", 1, cores=2), environ) == threads


def test_without_omp_num_threads_nothing_is_asked_for() -> None:
    assert threads_asked_for({}) is None and threads_asked_for({"OMP_NUM_THREADS": ""}) is None


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "9" * 5000, "²"])
def test_a_wrong_number_of_threads(text: str) -> None:
    said = sentence(lambda: threads_asked_for({"OMP_NUM_THREADS": text}))
    assert said.startswith("OMP_NUM_THREADS = '") and said.endswith("is not a number of threads → set it to 1 … 1024, or unset it")


@pytest.mark.parametrize(("local", "gpus"), [(2, 0), (64, 0), (1, 1), (2, 2), (2, 8)])
def test_ranks_that_have_a_gpu_each_or_run_on_the_cpu(local: int, gpus: int) -> None:
    refuse_shared_accelerators(Ranks(0, 0, local, local, "deepspeed", "a", 1), gpus)


@pytest.mark.parametrize(
    ("launcher", "way_out"),
    [
        ("deepspeed", "add `--num_gpus 1` to the deepspeed command"),
        ("torchrun", "add `--nproc_per_node 1` to the torchrun command"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused(launcher, way_out: str) -> None:
    """Of 4 ranks on two nodes, two are local."""
    said = sentence(lambda: refuse_shared_accelerators(Ranks(0, 0, 4, 2, launcher, "a", 1), 1))
    assert said == f"2 ranks on this machine need a GPU each, torch sees 1 GPU → {way_out}"


def test_ranks_of_srun_may_see_fewer_gpus_than_there_are_ranks() -> None:
    """Under --gpus-per-task=1 each sees its own. Those that share one are refused later (tests/parallel/test_distributed.py)."""
    refuse_shared_accelerators(Ranks(0, 3, 8, 4, "srun", "a", 1), 1)


def test_the_activation_that_a_user_needs(tmp_path, monkeypatch) -> None:
    """bash runs the command, so that its quotes are tried too."""
    folder = tmp_path / "a venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/activate").write_text("echo active")
    monkeypatch.chdir(tmp_path)
    assert activate_command(folder, {}) is None  # as conda's base is
    (folder / "pyvenv.cfg").touch()
    command = activate_command(folder, {})
    assert command == "source 'a venv/bin/activate'"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == "active\n"
    assert activate_command(folder, {"VIRTUAL_ENV": str(folder)}) is None
    assert activate_command(folder, {"VIRTUAL_ENV": str(tmp_path)}) == command
    assert activate_command(tmp_path, {}) is None


def test_versions_are_those_of_the_installed_packages() -> None:
    import torch

    said = versions(ROOT).split(" · ")
    assert said[0].startswith("tessera ") and said[2].startswith("Python 3.")
    assert said[3] == f"torch {torch.__version__.split('+')[0]}" and said[4] == f"deepspeed {pinned('deepspeed')}"


def pinned(package: str) -> str:
    """The version that requirements.txt names."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return next(line.partition("==")[2].split()[0] for line in lines if line.startswith(f"{package}=="))


def test_ssh_notices_that_a_host_is_gone() -> None:
    """What the user has set for pdsh's ssh stays."""
    alive = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3"
    assert kept_alive_by_ssh({}) == {"PDSH_SSH_ARGS_APPEND": alive}
    assert kept_alive_by_ssh({"PDSH_SSH_ARGS_APPEND": "-p 2222"}) == {"PDSH_SSH_ARGS_APPEND": f"-p 2222 {alive}"}
