"""`launch.py --check-cluster`: compares the hosts of a launch, times an all-reduce along each axis, and shows both as tables.

The comparison is the one that every launch makes (research/cluster/agreement.py). NCCL was not run.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text
from torch.distributed import ProcessGroup

from parallel.distributed import backend_versions, device
from parallel.errors import listed_up_to
from parallel.grid import Grid
from research.cluster.agreement import (
    FILES,
    Claims,
    differences,
    disagreement,
    folder_seen,
    not_shared,
    rounding_warnings,
    shown,
    unreachable,
)
from research.cluster.network import interface_of
from research.cluster.rendezvous import Rendezvous
from research.cluster.software import digest_of

CLOCK_ROUNDS = 8
"""Questions that each host's clock is compared by. The quickest answer counts."""
LATENCY_ROUNDS = 20
FIRST_BYTES, MOST_BYTES = 1 << 20, 1 << 28
"""Size of the first all-reduce that is timed for its bandwidth, and of the largest."""
BANDWIDTH_SECONDS, BANDWIDTH_ROUNDS = 0.5, 3
"""About how long one all-reduce should take to show a bandwidth, and how many are timed."""
CLOCK_WARNING = 1.0
"""Seconds by which a clock may differ without a warning: Tessera compares no clocks, but people read logs of several hosts."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class HostFacts:
    """One host, as its first rank sees it. `clock`: seconds by which its clock is ahead of rank 0's, and how far this may be wrong."""

    first_rank: int
    ranks: int
    host: str
    address: str
    interface: str
    threads: str
    cores: int
    memory_gb: float
    devices: str
    clock: tuple[float, float]


@dataclass(frozen=True)
class Link:
    """An all-reduce along one axis: seconds of a small one, and bytes per second and rank of a large one (nccl-tests' bus bandwidth)."""

    axis: str
    ranks: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Report:
    """What rank 0 knows after the comparison."""

    claims: list[Claims]
    hosts: list[HostFacts]
    folders: dict[str, tuple[str, list[list[str]]]]
    """Setting -> (path, (rank and host, trouble) of each rank)."""


def compare(rendezvous: Rendezvous, own: Claims, folders: Mapping[str, Path]) -> Report | None:
    """The report, on rank 0; None on the other ranks. `folders`: setting -> path. Collective."""
    ranks = rendezvous.ranks
    clock = clock_difference(rendezvous)
    facts = asdict(host_facts(own, ranks.local_world, clock)) if ranks.local_rank == 0 else None
    found: list[Any] = []

    def keep(values: list[Any]) -> None:
        found.extend(values)

    rendezvous.decide("everything about the hosts", [asdict(own), facts], keep)
    seen = {setting: (str(path), folder_seen(rendezvous, path, setting)) for setting, path in folders.items()}
    if ranks.rank > 0:
        return None
    claims = [Claims(**claim) for claim, _ in found]
    return Report(claims, [HostFacts(**each) for _, each in found if each], seen)


def host_facts(own: Claims, ranks: int, clock: tuple[float, float]) -> HostFacts:
    """This host."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total / 1e9
    interface = interface_of(own.address)
    return HostFacts(own.rank, ranks, own.host, own.address, interface, own.rounding["threads"], usable, memory, devices(), clock)


def devices() -> str:
    """'4 × H100 80 GB, driver 550.54, nccl 2.21.5'; the processor's kind where there is no GPU."""
    if not torch.cuda.is_available():
        return f"cpu, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    names: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name} {properties.total_memory / 1e9:.0f} GB"
        names[name] = names.get(name, 0) + 1
    words = NVIDIA_DRIVER.read_text().split() if NVIDIA_DRIVER.is_file() else []
    driver = next((word for word in words if word[0].isdigit() and "." in word), "unknown")
    return ", ".join([*(f"{count} × {name}" for name, count in names.items()), f"driver {driver}", backend_versions()[0]])


def clock_difference(rendezvous: Rendezvous, now: Callable[[], float] = time.time) -> tuple[float, float]:
    """(seconds by which this host's clock is ahead of rank 0's, the most by which this is wrong); (0, 0) on all but first ranks of hosts.

    Each first rank in turn asks rank 0 for its time, through the store. It was read at some moment between the question and the
    answer, most likely in the middle. Collective.
    """
    ranks, store = rendezvous.ranks, rendezvous.store
    firsts = rendezvous.decide("first ranks of hosts", ranks.rank - ranks.local_rank, lambda values: sorted({*values} - {0}))
    best = (0.0, float("inf"))
    for first in firsts:
        for number in range(CLOCK_ROUNDS):
            question, answer = f"clock/{first}/{number}/question", f"clock/{first}/{number}/answer"
            if ranks.rank == first:
                asked = now()
                store.set(question, "?")
                theirs = float(store.get(answer))
                heard = now()
                best = min(best, ((asked + heard) / 2 - theirs, (heard - asked) / 2), key=lambda each: each[1])
            elif ranks.rank == 0:
                store.get(question)
                store.set(answer, repr(now()))
    return best if ranks.rank in firsts else (0.0, 0.0)


def time_links(grid: Grid) -> list[Link]:
    """The all-reduces along each axis of more than one rank. All groups of an axis work at once, and the slowest counts. Collective."""
    axes = {"pipe": (grid.pipe_group, grid.pipe), "data": (grid.data_group, grid.data), "tensor": (grid.tensor_group, grid.tensor)}
    links = []
    for axis, (group, size) in axes.items():
        if group is None:
            continue
        latency = _slowest(median(_seconds(1, group) for _ in range(LATENCY_ROUNDS)))
        seconds = _slowest(min(_seconds(FIRST_BYTES, group) for _ in range(2)))
        size_bytes = int(min(MOST_BYTES, max(FIRST_BYTES, FIRST_BYTES * BANDWIDTH_SECONDS / seconds)))
        seconds = _slowest(median(_seconds(size_bytes, group) for _ in range(BANDWIDTH_ROUNDS)))
        links.append(Link(axis, size, latency, size_bytes / seconds * 2 * (size - 1) / size))
    return links


def _seconds(size: int, group: ProcessGroup) -> float:
    """How long an all-reduce of `size` bytes takes on this rank, from the moment that all ranks of the group are ready."""
    tensor = torch.zeros(max(1, size // 4), device=device())
    dist.all_reduce(torch.zeros(1, device=device()), group=group)
    _finish()
    began = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    _finish()
    return time.perf_counter() - began


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _slowest(seconds: float) -> float:
    """The largest of all ranks' values, on every rank."""
    value = torch.tensor([seconds], dtype=torch.float64, device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def fault_of(report: Report, required: Sequence[str]) -> str | None:
    """The sentence with which a launch of these hosts would be refused; None if they agree. `required`: settings of shared folders."""
    if fault := disagreement(report.claims) or unreachable(report.claims):
        return fault
    faults = (not_shared(report.folders[setting][0], setting, report.folders[setting][1]) for setting in required)
    return next(filter(None, faults), None)


def tables(report: Report, required: Sequence[str]) -> list[Table]:
    """Two tables for the terminal: the hosts, and what must be equal on them, with every value that differs."""
    return [_hosts(report), _agreement(report, required)]


def _hosts(report: Report) -> Table:
    table = _table("host", "ranks", "address", "threads", "cores", "memory", "clock", "devices")
    for host in report.hosts:
        last = host.first_rank + host.ranks - 1
        ranks = str(last) if host.ranks == 1 else f"{host.first_rank}–{last}"
        address = f"{host.address or 'none'}\n({host.interface or 'no interface'})"
        offset, wrong = host.clock
        clock = "rank 0's" if host.first_rank == 0 else f"{_time(offset, sign=True)}\n± {_time(wrong)}"
        style = "yellow" if abs(offset) - wrong > CLOCK_WARNING else ""
        memory = f"{host.memory_gb:.0f} GB"
        table.add_row(host.host, ranks, address, host.threads, str(host.cores), memory, Text(clock, style), host.devices)
    return table


def _agreement(report: Report, required: Sequence[str]) -> Table:
    table = _table("what", "value", "hosts")
    differing = {(each.kind, each.name) for each in differences(report.claims)}
    for kind, named in report.claims[0].named.items():
        values = {name: value for name, value in named.items() if kind != "variables" or value is not None}
        same = {name: value for name, value in values.items() if (kind, name) not in differing}
        if kind == "settings":
            _add(table, kind, f"{len(same)} equal", "all")
        elif kind in FILES:
            everyone = [claims.named[kind] for claims in report.claims]
            if all(files == everyone[0] for files in everyone):
                _add(table, kind, f"SHA-256 {digest_of(everyone[0])[:16]} of {len(same)} files", "all")
            else:
                _grouped(table, kind, [f"SHA-256 {digest_of(files)[:16]} of {len(files)} files" for files in everyone], report)
        else:
            for name, value in same.items():
                _add(table, name, shown(value), "all")
            if kind == "variables" and not values:
                _add(table, kind, "none that changes numbers", "all")
        for name in (name for each, name in differing if each == kind):
            short = [_value(claims, kind, name) for claims in report.claims]
            _grouped(table, name, short, report)
    for setting, (path, seen) in report.folders.items():
        unseen = [who for who, why in seen if why]
        need = "" if setting in required else " (need not be shared: each host then prepares its own)"
        text = f"shared: {path}" if not unseen else f"not shared: {path}{need}"
        style = "" if not unseen else "red" if setting in required else "yellow"
        _add(table, setting, text, "all" if not unseen else f"not {listed_up_to(unseen, 2)}", style)
    return table


def _value(claims: Claims, kind: str, name: str) -> str:
    value = claims.named[kind].get(name)
    if kind in FILES:
        return f"SHA-256 {value[:16]}" if value else "not there"
    return shown(value)


def _grouped(table: Table, name: str, values: Sequence[str], report: Report) -> None:
    """One row for each value, with the hosts that have it; that of rank 0 comes first."""
    hosts: dict[str, dict[str, None]] = {}
    for claims, value in zip(report.claims, values, strict=True):
        hosts.setdefault(value, {})[claims.host] = None
    for number, (value, with_it) in enumerate(hosts.items()):
        _add(table, name if number == 0 else "", value, listed_up_to(with_it, 3) + (" ← differs" if number else ""), "red")


def _add(table: Table, name: str, value: str, hosts: str, style: str = "") -> None:
    table.add_row(Text(name, style), Text(value, style), Text(hosts, style))


def links_table(links: Sequence[Link]) -> Table:
    """The all-reduces for the terminal."""
    table = _table("all-reduce along", "ranks", "latency", "bandwidth")
    for link in links:
        table.add_row(link.axis, str(link.ranks), _time(link.latency), f"{link.bandwidth / 1e9:.3g} GB/s")
    return table


def warnings(report: Report) -> list[str]:
    """Sentences about what differs without keeping the hosts from training together."""
    found = rounding_warnings(report.claims)
    for host in report.hosts:
        offset, wrong = host.clock
        if abs(offset) - wrong > CLOCK_WARNING:
            found.append(f"the clock of {host.host} is {_time(offset, sign=True)} off: times in the logs of several hosts do not compare")
    return found


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _time(seconds: float, sign: bool = False) -> str:
    """'12 µs', '+1.5 ms', '2.03 s'."""
    size = abs(seconds)
    value, unit = (seconds * 1e6, "µs") if size < 1e-3 else (seconds * 1e3, "ms") if size < 1 else (seconds, "s")
    return f"{value:+.3g} {unit}" if sign else f"{value:.3g} {unit}"
