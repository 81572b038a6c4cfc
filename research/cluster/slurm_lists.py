"""Slurm's short forms of lists in its environment variables: the hosts of a step, and how many tasks each of them has."""

import re

from parallel.errors import Mistake


def tasks_per_node(text: str) -> list[int]:
    """Slurm's '2(x3),1' -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise Mistake(f"Slurm's tasks per node = {text!r} is not understood → add `--ntasks-per-node N` to the srun command")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(hosts: str) -> str:
    """The first of Slurm's 'node[003-006,9],other': 'node003'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else hosts)


def expand_hosts(hosts: str) -> list[str]:
    """All of Slurm's 'node[003-005,9],other': ['node003', 'node004', 'node005', 'node9', 'other']."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        opening = re.search(r"\[([^\]]*)\]", part)
        if opening is None:
            names.append(part)
            continue
        for piece in opening[1].split(","):
            first, _, last = piece.partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()):
                return []
            numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
            names += expand_hosts(",".join(part[: opening.start()] + number + part[opening.end() :] for number in numbers))
    return names
