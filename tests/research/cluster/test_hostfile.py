"""The hostfile is read as DeepSpeed reads it, and the script for the first host writes one, with the environment that ranks need."""

import os
import subprocess
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research.cluster.hostfile import Host, hostfile_script, parse, read, text_of, torchrun_script

HOSTS = [Host("node1", 8), Host("10.0.0.2", 4)]
GOOD = ["node1 slots=8\n10.0.0.2 slots=4\n", "# the cluster\n\n  node1   slots=8 # new\n10.0.0.2\tslots=4 max_slots=9"]
BAD = {
    "node1": "FILE:1: 'node1' is not a host and its ranks",
    "node1 slots=8\nnode2 slots=x": "FILE:2: 'node2 slots=x' is not a host and its ranks",
    "node1 slots=0": "FILE:1: 'node1 slots=0' is not a host and its ranks",
    "node1 slots=8\nnode1 slots=8": "FILE:2: node1 is named twice",
    "# none\n": "FILE names no host",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_a_hostfile_says(text: str) -> None:
    assert parse(text, "FILE") == parse(text_of(HOSTS), "FILE") == HOSTS


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_hostfile(text: str) -> None:
    with pytest.raises(Mistake, match=BAD[text]):
        parse(text, "FILE")


def test_a_hostfile_that_is_missing() -> None:
    with pytest.raises(Mistake, match="there is no hostfile no/such/file → write one line per host"):
        read(Path("no/such/file"))


@pytest.mark.slow  # it imports DeepSpeed's launcher
@pytest.mark.parametrize("text", [*GOOD, *BAD])
def test_deepspeed_reads_the_same(text: str) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    if text in GOOD:
        assert list(_parse_hostfile(text.splitlines(keepends=True)).items()) == [tuple(host) for host in HOSTS]
    elif "slots=0" not in text:  # DeepSpeed takes a host without ranks, and then starts nothing on it
        with pytest.raises(ValueError):
            _parse_hostfile(text.splitlines(keepends=True))


def test_the_script_writes_the_hostfile_and_what_travels(tmp_path: Path) -> None:
    """The script itself runs, with a deepspeed that only says how it was called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/deepspeed").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "bin/deepspeed").chmod(0o755)
    words = ["experiments/x/launch.py", "--sample.prompts", "My fellow", "$HOME"]
    script = hostfile_script("x", HOSTS, tmp_path, words, "true", ["layout   data 12"])
    given = {"WANDB_PROJECT": "p", "WANDB_API_KEY": "secret", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "2"}
    given |= {"WANDB_NOTES": "two\nlines=1", "WANDB_NAME": 'a "quoted" $(name)', "OTHER": "1"}
    environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **given}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "--hostfile hosts-x experiments/x/launch.py --sample.prompts My fellow $HOME\n"
    assert read(tmp_path / "hosts-x") == HOSTS
    lines = sorted((tmp_path / ".deepspeed_env").read_text().splitlines())
    assert lines == ["GLOO_SOCKET_IFNAME=eth0", "NCCL_DEBUG=INFO", "OMP_NUM_THREADS=2", "WANDB_PROJECT=p"]


@pytest.mark.slow  # it imports DeepSpeed's launcher
def test_what_deepspeed_takes_to_other_hosts_is_what_the_script_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own runner, up to the pdsh command that it would run."""
    from deepspeed.launcher import runner

    from research.cluster.remote import MARK

    commands = []

    class Popen:
        returncode = 0

        def __init__(self, command, env):
            commands.append(command)

        def wait(self):
            return 0

    (tmp_path / ".deepspeed_env").write_text("WANDB_PROJECT=p\nNCCL_DEBUG=INFO\n")
    (tmp_path / "hosts").write_text(text_of(HOSTS))
    for name in [name for name in os.environ if name.startswith(("PYTHON", "NCCL"))]:
        monkeypatch.delenv(name)
    for name, value in {MARK: "abc", "OTHER": "1", "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner.subprocess, "Popen", Popen)
    options = ["--hostfile", "hosts", "--no_ssh_check", "--master_addr", "10.0.0.1"]
    runner.main([*options, "launch.py"])
    exports = commands[0][commands[0].index("node1,10.0.0.2") + 1]
    assert sorted(exports.split("; ")[:-1]) == [
        "export NCCL_DEBUG=INFO",
        f"export PYTHONPATH={tmp_path}",
        f"export {MARK}=abc",
        "export WANDB_PROJECT=p",
    ]


def test_torchrun_meets_at_the_first_host() -> None:
    hosts = [Host("node1", 4), Host("node2", 4)]
    script = torchrun_script("x", hosts, Path("/tessera"), ["experiments/x/launch.py"], "source activate", [])
    said = "exec torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint node1:29400 --rdzv_id x \\\n"
    assert said + "    experiments/x/launch.py\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
