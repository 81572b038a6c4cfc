"""What all tests share: one torch thread, and a report at the end of a long run that says where its time went."""

import collections
import statistics
import time

import pytest
import torch

from tests.harness import run_ranks, start_server

FOUR_RANKS = "four_ranks_seconds"
"""The property of a test's report that holds the time of a four-rank engine test."""
HOSTS = "hosts"
"""The marker of tests on two hosts, and the property of their reports."""
BUDGETS: dict[str, float] = {
    **{"tests/models": 60, "tests/parallel": 160},
    **{f"tests/research/{room}": 25 for room in ("ablation", "cluster", "config", "data", "evaluation", "generation")},
    **{f"tests/research/{room}": 45 for room in ("exchange", "reliability", "serving", "verification")},
    **{f"tests/research/{room}": 60 for room in ("cli", "end_to_end", "tracking")},
    "tests/research/training": 140,
}
"""Seconds that the fast tests of a room may take on two idle cores, summed over its tests."""
LONG_RUN = 60.0
"""Seconds of test time from which a run ends with a report of its slowest files."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are so small that a second thread only waits: up to 40 times slower on shared cores


def pytest_make_parametrize_id(val: object) -> str | None:
    """The name of a case made of bytes: their number. A compressed file holds the second in which it was made, and the
    processes of one run must collect the same names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker(HOSTS):
        item.user_properties.append((HOSTS, True))
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")


@pytest.fixture
def timed_run_ranks(request: pytest.FixtureRequest):
    """run_ranks, its wall time recorded; the server that ranks are forked from runs already."""

    def timed(*arguments):
        start_server()
        run_ranks(int, 1)  # the server answers when it has imported everything
        start = time.perf_counter()
        results = run_ranks(*arguments)
        request.node.user_properties.append((FOUR_RANKS, time.perf_counter() - start))
        return results

    return timed


def show_hosts(terminalreporter: pytest.TerminalReporter, reports: list[pytest.TestReport]) -> None:
    """One line for each test on two hosts: its outcome, its seconds, and what it shows."""
    if not reports:
        return
    seconds, outcomes, reasons = collections.Counter[str](), dict[str, str](), set[str]()
    for report in reports:
        seconds[report.nodeid] += report.duration
        if report.when == "call" or not report.passed:
            outcomes[report.nodeid] = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            reasons.add(report.longrepr[2])
    terminalreporter.section("on two hosts")
    for test, outcome in outcomes.items():
        shown = test.partition("::test_")[2].replace("_", " ")
        terminalreporter.write_line(f"{outcome:7} {seconds[test]:6.1f} s  {shown[:120]}")
    for reason in sorted(reasons):
        terminalreporter.write_line(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group if isinstance(report, pytest.TestReport)]
    show_hosts(terminalreporter, [report for report in reports if (HOSTS, True) in report.user_properties])
    if seconds := [value for report in reports if report.when == "call" for name, value in report.user_properties if name == FOUR_RANKS]:
        median = statistics.median(seconds)
        terminalreporter.write_line(f"harness: 4-rank engine test (init, build, one step) median {median:.1f} s over {len(seconds)}")
    if sum(report.duration for report in reports) < LONG_RUN:
        return
    files, cases, rooms = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    for report in reports:
        file = report.nodeid.partition("::")[0]
        room = next((room for room in BUDGETS if file.startswith(f"{room}/")), "the rest")
        files[file] += report.duration  # set-up and tear-down included
        cases[report.nodeid] += report.duration
        rooms[room] += report.duration
    terminalreporter.section("where the time went")
    for title, durations, most in (("files", files, 12), ("tests", cases, 8)):
        terminalreporter.write_line(f"slowest {title}")
        for name, duration in durations.most_common(most):
            terminalreporter.write_line(f"{duration:7.1f} s  {name[:110]}")
    terminalreporter.write_line("rooms, with the budget of their fast tests (tests/conftest.py)")
    for room, duration in rooms.most_common():
        terminalreporter.write_line(
            f"{duration:7.1f} s  of {BUDGETS[room]:3.0f} s  {room}" if room in BUDGETS else f"{duration:7.1f} s  {room}"
        )
