"""`cluster` prints a script that its readers take, or refuses the layout as a launch on so many ranks would. By Slurm: test_slurm.py."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cli.cluster import main
from research.cluster.environment import find_ranks
from research.config.experiment_folder import load
from research.config.overrides import parse
from research.training.job import resolve
from tests.research.helpers.launches import slurm

HERE = ["experiments/gpt_sotu"]
FITTING = ["--schedule.micro_batch_size", "2"]
"""gpt_sotu has a batch of 16: 8 data ranks of micro-batches of 2."""


def printed(capsys: pytest.CaptureFixture, *argv: str) -> tuple[str, str]:
    """(standard output, standard error) of the verb; the script must be correct bash."""
    main([*HERE, *argv])
    out, err = capsys.readouterr()
    checked = subprocess.run(["bash", "-n"], input=out, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, ""), out
    return out, err


def options(script: str) -> dict[str, str]:
    """The #SBATCH options, which must stand before the first command: Slurm reads no further."""
    head = itertools.takewhile(lambda line: line.startswith("#"), filter(None, script.splitlines()))
    lines = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert lines == re.findall(r"^#SBATCH --(.*)$", "\n".join(head), re.MULTILINE)
    return dict(line.partition("=")[::2] for line in lines)


def launched(script: str) -> list[str]:
    """The words of the command that starts the ranks."""
    return shlex.split(re.search(r"^(?:exec |srun )(.*?)(?: \|\| .*)?$", script.replace("\\\n", ""), re.MULTILINE)[1])


def test_a_slurm_script(capsys: pytest.CaptureFixture) -> None:
    more = ["--time", "12:00:00", "--partition=gpu", "--account", "lab", "--job-name", "mine", "--cpus", "6", "--grace", "300"]
    out, err = printed(capsys, "--slurm", "--nodes", "2", "--gpus", "4", *more, "--sbatch=--qos=long", *FITTING, "--requeues", "7")
    expected = {"job-name": "mine", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "6", "time": "12:00:00"}
    expected |= {"partition": "gpu", "account": "lab", "chdir": str(ROOT), "output": "slurm-%x-%j.log", "open-mode": "append"}
    assert options(out) == expected | {"requeue": "", "signal": "USR1@300", "qos": "long"}
    words = launched(out)
    assert words[:3] == ["--kill-on-bad-exit=0", "--wait=0", "python"] or words[2] == sys.executable
    assert words[3:] == ["experiments/gpt_sotu/launch.py", *FITTING, "--resume", "auto"]
    assert "\nexport OMP_NUM_THREADS=6 SRUN_CPUS_PER_TASK=6 " in out and '"$count" -gt 7 ]' in out
    assert "# layout   pipe 1 × data 8 × tensor 1 · ZeRO-1 · fp32\n# batch    16 sequences = 2 micro × 1 accumulated × 8 data" in out
    assert err == "warn   checkpoints.every = 0: if a node fails, the job begins anew → add --checkpoints.every N\n"


def test_tensor_ranks_on_several_nodes_are_warned_of_once(capsys: pytest.CaptureFixture) -> None:
    _, err = printed(capsys, "--slurm", "--nodes", "4", "--gpus", "1", "--parallel.tensor", "2", "--checkpoints.every", "5", *FITTING)
    assert err.count("warn ") == err.count("parallel.tensor = 2") == 1 and "does not divide the 1 rank of a node" in err


def test_what_is_not_asked_for_is_left_to_slurm(capsys: pytest.CaptureFixture) -> None:
    settings = ["--checkpoints.every", "5", "--parallel.tensor=2", "--resume=auto"]
    out, err = printed(capsys, "--slurm", "--nodes", "1", "--gpus", "2", "--cpu-only", "--activate", "module load x && . env", *settings)
    assert set(options(out)) == {"job-name", "nodes", "ntasks-per-node", "chdir", "output", "open-mode", "requeue", "signal"}
    assert "export" not in out and "\nmodule load x && . env\n" in out and err == ""
    assert launched(out)[3:] == ["experiments/gpt_sotu/launch.py", *settings]


def test_a_hostfile_and_a_torchrun_script(capsys: pytest.CaptureFixture) -> None:
    out, _ = printed(capsys, "--hostfile", "--hosts", "a, b", "--gpus", "4", "--", *FITTING)
    assert "<<'END'\na slots=4\nb slots=4\nEND\n" in out and f"\ncd {ROOT}\n" in out
    assert launched(out) == ["deepspeed", "--hostfile", "hosts-gpt_sotu", "experiments/gpt_sotu/launch.py", *FITTING]
    out, _ = printed(capsys, "--torchrun", "--nodes", "2", "--gpus", "4", *FITTING)
    assert launched(out)[:7] == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--rdzv_backend", "c10d"]
    assert "--rdzv_endpoint node1:29400" in out


MISTAKES = {
    "--slurm --nodes 3 --gpus 3 --parallel.tensor 4": "parallel.tensor = 4 does not divide model.num_heads = 6 → use 1, 2, 3 or 6",
    "--slurm --nodes 4 --gpus 8 --parallel.tensor 3": "divide nodes × GPUs = 4 × 8 = 32 → use --gpus 6 or 9, or --nodes 3 or 6",
    "--slurm --nodes 1 --gpus 1 --parallel.pipe 4": "4 × 1 = 4 does not divide nodes × GPUs = 1 × 1 = 1 → use --gpus 4, or --nodes 4",
    "--slurm --nodes 4 --gpus 8": "is not a multiple of schedule.micro_batch_size × data ranks = 8 × 32 = 256 → use batch_size",
    "--slurm --nodes 4 --gpus 8 --parallel.tensr 4": "parallel.tensr is not a setting → did you mean parallel.tensor?",
    "--slurm --nodes 2 --gpus 4 --resume never": "--resume never would begin again after each requeue",
    "--slurm --nodes 2 --gpus 4 --time 1day": "--time '1day' is not a time limit of Slurm",
    "--slurm --nodes 2 --gpus 4 --account $(id)": "--account '$(id)' is not one word",
    "--slurm --gpus 4": "--nodes is missing → add --nodes N",
    "--slurm --nodes 2": "the following arguments are required: --gpus",
    "--nodes 2 --gpus 4": "one of the arguments --slurm --hostfile --torchrun is required",
    "--slurm --nodes 0 --gpus 4": "argument --nodes: '0' is not a whole number from 1",
    "--slurm --hostfile --nodes 2 --gpus 4": "not allowed with argument --slurm",
    "--hostfile --hosts a,b --nodes 3 --gpus 4": "--hosts names 2 hosts, --nodes says 3",
    "--hostfile --hosts a,a --gpus 4": "--hosts a,a names a host twice",
    "--slurm --nodes 2 --gpus 4 --dry-run": "python -m research cluster does not know --dry-run",
    "--slurm --nodes 2 --gpus 4 -- --dry-run": "--help, --version, --dry-run and --check-cluster train nothing",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_printed(argv: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(Mistake) as mistake:
        main([*HERE, *argv.split()])
    assert MISTAKES[argv] in str(mistake.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 3)])
def test_a_layout_is_refused_if_and_only_if_a_launch_refuses_it(nodes: int, gpus: int) -> None:
    """The launch is one on so many ranks by srun, from its environment variables on."""
    loaded = load(ROOT / "experiments/gpt_sotu")
    environ = slurm(0, nodes * gpus, 20000) | {"SLURM_STEP_TASKS_PER_NODE": f"{gpus}(x{nodes})", "SLURM_NNODES": str(nodes)}
    found = set()
    for tensor, pipe, micro in itertools.product((1, 2, 3), (1, 2), (1, 8)):
        settings = ["--parallel.tensor", str(tensor), "--parallel.pipe", str(pipe), "--schedule.micro_batch_size", str(micro)]
        experiment, overrides, given = parse(loaded.experiment, settings)
        launch = functools.partial(resolve, replace(loaded, experiment=experiment), overrides, find_ranks(environ), given, settings)
        verb = functools.partial(main, [*HERE, "--slurm", "--nodes", str(nodes), "--gpus", str(gpus), *settings])
        outcomes = [outcome(launch), outcome(verb)]
        assert outcomes[0] == outcomes[1], settings
        found.add(outcomes[0])
    assert found >= {"fits", "parallel.pipe"}


def outcome(run: Callable[[], object]) -> str:
    """'fits', or the setting with which the refusal begins."""
    try:
        run()
    except Mistake as mistake:
        return str(mistake).partition(" ")[0]
    return "fits"


def test_it_runs_without_torch_from_another_folder(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    code = "import sys, research.cli.cluster as verb; verb.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [str(ROOT / HERE[0]), "--slurm", "--nodes", "2", "--gpus", "4", *FITTING]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"#SBATCH --chdir={ROOT}\n" in done.stdout and "    experiments/gpt_sotu/launch.py " in done.stdout
