"""`--check-cluster` in a process: what makes no progress ends, as in a run. What it shows of hosts: end_to_end/test_unequal_hosts.py."""

import subprocess
import sys

import pytest

from research import ROOT
from research.cluster.exit_codes import HUNG
from tests.research.end_to_end.test_launch_errors import environment

HANGS = """
import time
from research.cluster import host_tables
from research.launch import run

host_tables.time_links = lambda grid: time.sleep(600)  # an all-reduce over a link that is down
run("experiments/gpt_sotu/launch.py")
"""


@pytest.mark.slow
def test_a_check_that_hangs_ends_with_a_sentence() -> None:
    command = [sys.executable, "-c", HANGS, "--check-cluster", "--watch.rendezvous_seconds", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == HUNG, done.stderr
    assert done.stderr.startswith("error  no progress for ") and "at 'timing all-reduces'" in done.stderr and done.stderr.count("\n") == 1
