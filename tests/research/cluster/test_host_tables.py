"""What --check-cluster shows: clocks, folders, differences and links of hosts, readable at 80 columns."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from parallel.grid import make_grid
from research.cluster import agreement, host_tables
from research.cluster.agreement import check_shared_folder, disagreement
from research.cluster.host_tables import HostFacts, Link, Report, clock_difference, compare, fault_of, links_table, tables, time_links
from research.cluster.rendezvous import Rendezvous
from research.tracking.console import show_tables
from tests.harness import run_ranks
from tests.research.cluster.test_agreement import CLAIMS, claims_on, other
from tests.research.cluster.test_rendezvous import met, ranks_of, said

AHEAD = {0: 0.0, 2: 2.5, 4: -300.0}
"""The clocks of three hosts, by their first ranks: seconds ahead of the real time."""
HOSTS = [
    HostFacts(0, 2, "a", "10.0.0.1", "eth0", "4", 8, 33.6, "cpu, x86_64 AVX512", (0.0, 0.0)),
    HostFacts(2, 2, "b", "10.0.0.2", "eth0", "4", 8, 33.6, "2 × NVIDIA H200 144 GB, driver 550.54.14, NCCL 2.26.2", (2.5, 0.0004)),
]
FOLDERS = {
    "track.runs": ("/shared/tessera/runs", [["rank 0 on a", ""], ["rank 2 on b", ""]]),
    "data.cache": ("/local/cache", [["rank 0 on a", ""], ["rank 2 on b", "does not see it"]]),
}


def shown(report: Report) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:  # no terminal: 80 columns
        show_tables([*tables(report, ["track.runs"]), links_table([Link("tensor", 2, 0.0000421, 1.234e9), Link("data", 2, 0.12, 3e6)])])
    return shown.getvalue().splitlines()


def row(lines: list[str], name: str) -> str:
    return " ".join(next(line for line in lines if line.startswith(f"{name} ")).split())


def test_each_hosts_clock_is_compared_with_rank_0s() -> None:
    def body(rendezvous: Rendezvous) -> Any:
        import time

        return clock_difference(rendezvous, lambda: time.time() + AHEAD.get(rendezvous.ranks.rank, 7.0))

    found = met(6, body)
    assert [found[rank] for rank in (0, 1, 3, 5)] == [(0.0, 0.0)] * 4
    for rank in (2, 4):
        difference, wrong = found[rank]
        assert 0 < wrong < 5 and abs(difference - AHEAD[rank]) <= wrong


def test_rank_0_knows_everything_and_nothing_is_left_behind(tmp_path: Path) -> None:
    def body(rendezvous: Rendezvous) -> Any:
        return compare(rendezvous, claims_on(rendezvous, 2), {"track.runs": tmp_path / "runs", "data.cache": tmp_path / "cache"})

    report, *others = met(4, body)
    assert others == [None] * 3 and list(tmp_path.iterdir()) == []
    assert [(host.host, host.first_rank, host.ranks) for host in report.hosts] == [("a", 0, 2), ("b", 2, 2)]
    assert [claims.rank for claims in report.claims] == [0, 1, 2, 3] and disagreement(report.claims) is None
    assert all(why == "" for _, seen in report.folders.values() for _, why in seen)


def test_equal_hosts_are_shown_at_80_columns() -> None:
    lines = shown(Report([CLAIMS, other(1, "a"), other(2), other(3)], HOSTS, FOLDERS))
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert row(lines, "a") == "a 0–1 10.0.0.1 4 8 34 GB rank 0's cpu, x86_64 AVX512"
    assert row(lines, "b").startswith("b 2–3 10.0.0.2 4 8 34 GB +2.5 s ")
    assert row(lines, "settings") == "settings 4 equal all" and row(lines, "torch") == "torch 2.13.0 all"
    assert row(lines, "track.runs") == "track.runs shared: /shared/tessera/runs all"
    assert row(lines, "data.cache").startswith("data.cache not shared: /local/cache")
    assert row(lines, "tensor") == "tensor 2 42.1 µs 1.23 GB/s" and row(lines, "data") == "data 2 120 ms 0.003 GB/s"
    assert "differs" not in "\n".join(lines)


def test_every_difference_has_a_row_for_each_value() -> None:
    changed = {"settings": {"model.num_layers": 3}, "library": {"models/mlp.py": "f" * 64}, "versions": {"torch": "2.12.0"}}
    report = Report([CLAIMS, other(1, "a"), other(2, **changed), other(3, **changed)], HOSTS, FOLDERS)
    lines = shown(report)
    for name, first, second in (
        ("model.num_layers", "2", "3"),
        ("torch", "2.13.0", "2.12.0"),
        ("models/mlp.py", "SHA-256 1", f"SHA-256 {'f' * 16}"),
    ):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name} "))
        assert " ".join(lines[at].split()) == f"{name} {first} a" and " ".join(lines[at + 1].split()) == f"{second} b ← differs"
    assert max(map(len, lines)) <= 80
    assert (fault_of(report, ["track.runs"]) or "").startswith("rank 2 on b has model.num_layers = 3, rank 0 on a has 2")


def test_a_folder_that_must_be_shared_is_a_fault_and_one_that_need_not_be_is_none() -> None:
    report = Report([CLAIMS, other(2)], HOSTS, FOLDERS)
    assert fault_of(report, ["track.runs"]) is None
    assert (fault_of(report, ["track.runs", "data.cache"]) or "").startswith(
        "the hosts do not share /local/cache: rank 0 on a has written to it, rank 2 on b does not see it → "
    )


@pytest.mark.parametrize("layers", [2, 3], ids=["the folder", "the folder and a setting"])
def test_the_sentence_is_that_with_which_a_launch_is_refused(layers: int, tmp_path: Path, monkeypatch) -> None:
    """A launch compares the claims before the folder, and so must the sentence of --check-cluster if both are wrong."""
    read = agreement._read_and_write
    monkeypatch.setattr(agreement, "NONCE_SECONDS", 0.2)
    monkeypatch.setattr(agreement, "_read_and_write", lambda path, nonce, rank: read(path / "own" if rank == 3 else path, nonce, rank))

    def launched(rendezvous: Rendezvous) -> Any:
        agreement.agree(rendezvous, claims_on(rendezvous, layers if rendezvous.ranks.rank == 3 else 2))
        check_shared_folder(rendezvous, tmp_path / "runs", "track.runs")

    def checked(rendezvous: Rendezvous) -> Any:
        return compare(rendezvous, claims_on(rendezvous, layers if rendezvous.ranks.rank == 3 else 2), {"track.runs": tmp_path / "runs"})

    refused, report = said(met(4, launched)), met(4, checked)[0]
    nonce = re.compile(r"\.shared-\w+")
    assert "rank 3 on b" in refused and nonce.sub("", fault_of(report, ["track.runs"]) or "") == nonce.sub("", refused)


def test_a_clock_that_is_off_is_a_warning() -> None:
    assert host_tables.warnings(Report([CLAIMS, other(2)], HOSTS, FOLDERS)) == [
        "the clock of b is +2.5 s off: times in the logs of several hosts do not compare"
    ]
    near = [HOSTS[0], replace(HOSTS[1], clock=(1.2, 0.5))]
    assert host_tables.warnings(Report([CLAIMS, other(2)], near, FOLDERS)) == []


def on_four_ranks() -> list[tuple[str, int, float, float]]:
    """A small first size, so that the test is quick; and afterwards collectives still match."""
    host_tables.FIRST_BYTES, host_tables.BANDWIDTH_SECONDS = 4096, 0.001
    links = time_links(make_grid(1, 2))
    total = [0] * 4
    dist.all_gather_object(total, dist.get_rank())
    assert total == [0, 1, 2, 3]
    return [(link.axis, link.ranks, link.latency, link.bandwidth) for link in links]


def test_all_reduces_are_timed_along_every_axis_of_more_than_one_rank() -> None:
    first, *others = run_ranks(on_four_ranks, 4)
    assert others == [first] * 3, "every rank has the slowest rank's times"
    assert [(axis, ranks) for axis, ranks, _, _ in first] == [("data", 2), ("tensor", 2)]
    assert all(0 < latency < 10 and bandwidth > 0 for _, _, latency, bandwidth in first)


def test_a_world_of_one_has_a_table_too(tmp_path: Path) -> None:
    rendezvous = Rendezvous.alone(ranks_of(0, 1))
    report = compare(rendezvous, claims_on(rendezvous, 2), {"track.runs": tmp_path / "runs"})
    assert report and len(report.hosts) == 1 and shown(report)


@pytest.mark.parametrize(("seconds", "text"), [(0.0000123, "12.3 µs"), (0.5, "500 ms"), (-2.5, "-2.5 s")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert host_tables._time(seconds) == text
