"""Two hosts on one machine, as far as a launcher tells the ranks: each has a tree, a command line and an environment of its own.

No namespace is needed. The hosts of tests/research/helpers/hosts.py have one tree at one path, and one command line but for its settings.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from research import ROOT
from tests.research.helpers.hosts import slurm
from tests.research.helpers.launches import Launch, Place, _command, _environment, free_port

CODE = ("parallel", "models", "research", "experiments")


def tree(path: Path, *changes: tuple[str, str, str]) -> Path:
    """A tree without .git, in which each file of `changes` has one text instead of another: (path, old, new)."""
    path.mkdir(parents=True)
    for folder in CODE:
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", path)
    for file, old, new in changes:
        text = (path / file).read_text()
        assert old in text, (file, old)
        (path / file).write_text(text.replace(old, new))
    return path


def launch(
    place: Place,
    trees: tuple[Path, Path] = (ROOT, ROOT),
    launcher: str = "srun",
    words: tuple[list[str], list[str]] = ([], []),
    environs: tuple[dict[str, str], dict[str, str]] = ({}, {}),
    hosts: tuple[int, ...] = (0, 1),
    restarts: int = 0,
    options: list[str] | None = None,
    **changes: Any,
) -> Launch:
    """One rank on each host, started side by side by srun's variables or by torchrun. `words` end each host's command line.

    `hosts`: those that really start; `restarts`: how often torchrun starts its ranks again. Nothing but the ranks themselves
    ends the other host's rank.
    """
    port = free_port()
    settings = place.settings({name.replace("__", "."): value for name, value in changes.items()})
    commands, variables = [], []
    for host in hosts:
        command = [str(trees[host] / "experiments/gpt_sotu/launch.py"), *settings, *(options or []), *words[host]]
        if launcher == "torchrun":
            where = ["--max_restarts", str(restarts), "--nnodes", "2", "--node_rank", str(host)]
            where += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
            commands.append([*_command("torchrun", "torch.distributed.run"), *where, "--nproc_per_node", "1", *command])
            variables.append(_environment(place) | environs[host])
        else:
            commands.append([sys.executable, *command])
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            variables.append(_environment(place) | slurm(host, ["a", "b"]) | meeting | environs[host])
    return Launch(place, commands, Path(os.sep), variables)
