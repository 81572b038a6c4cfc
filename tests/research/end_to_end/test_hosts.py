"""The hosts that the tests of several hosts run on are separate hosts: tests/research/helpers/hosts.py. No launch of ours is in here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from research import ROOT
from tests.research.helpers import hosts
from tests.research.helpers.hosts import Cluster, why_not
from tests.research.helpers.launches import Place

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
REACHES = "exec 3<>/dev/tcp/{}/22"
"""A command of bash that fails unless an sshd listens at this address."""
LEAVES_A_CLUSTER = """
import os, sys, time
from pathlib import Path
from tests.research.helpers.hosts import Cluster
from tests.research.helpers.launches import Place
with Cluster(Place(Path(sys.argv[1]))) as cluster:
    for host in cluster.hosts:
        host.popen(["setsid", "sleep", "1000"], Path("/"))
    print(*[space.pid_namespace for space in (cluster, *cluster.hosts)], flush=True)
    if sys.argv[2] == "raises":
        raise SystemExit(1)
    time.sleep(1000)
"""


def test_a_machine_that_cannot_make_hosts_says_why(hosts_can_be_made: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a program, and where user namespaces are forbidden (here inside of one: outside, the setting is the machine's)."""
    says = "from tests.research.helpers.hosts import why_not; print(why_not())"
    forbids = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "bash", "-c", forbids, sys.executable, says]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("namespaces with a network of their own cannot be made here (unshare: "), done
    monkeypatch.setattr(hosts, "PROGRAMS", ("bash", "no_such_program"))
    assert str(why_not.__wrapped__()).startswith("there is no no_such_program → install it")


def test_each_host_has_a_name_an_address_a_home_a_boot_and_processes_of_its_own(cluster: Cluster) -> None:
    for number, host in enumerate(cluster.hosts, 1):
        assert host.run("hostname") == f"node{number}\n" and host.run("hostname", "-I").strip() == f"10.77.0.{number}"
        (cluster.place.home / "note").write_text("outside")
        assert not host.run("find", str(cluster.place.home), "-name", "note"), "its home is the outer one"
        assert len(host.run("ps", "-A", "-o", "pid=").split()) == 4, "it sees processes beside its own: init, sleep, sshd and ps"
    assert len({host.run("cat", "/proc/sys/kernel/random/boot_id") for host in cluster.hosts}) == 2
    assert cluster.processes() == []


@pytest.mark.parametrize("command", [("ssh",), ("env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-N", "-S", "-w")], ids=["ssh", "pdsh"])
def test_ssh_and_pdsh_lead_from_one_host_to_the_other(command: tuple[str, ...], cluster: Cluster) -> None:
    assert cluster[0].run(*command, "node2", "hostname; echo $HOME").split() == ["node2", str(cluster.place.home)]
    assert cluster[1].run(*command, "node1", "id -un").split() == ["researcher"]


def test_no_host_reaches_the_outer_network(cluster: Cluster) -> None:
    """Neither another machine, for there is no route, nor a server that listens on this one."""
    for host in cluster.hosts:
        assert host.run("ip", "-4", "route").split()[0] == "10.77.0.0/24" and "default" not in host.run("ip", "route")
    with subprocess.Popen(
        [sys.executable, "-c", "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); s.accept()"],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        port = server.stdout.readline().strip()
        with pytest.raises(AssertionError, match="Connection refused"):
            cluster[0].run("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}")
        server.kill()


def test_a_disk_is_shared_until_a_host_has_one_of_its_own(cluster: Cluster) -> None:
    shared = cluster.place.path / "shared"
    shared.mkdir()
    cluster[0].run("bash", "-c", f"echo everywhere > {shared}/file")
    assert cluster[1].run("cat", f"{shared}/file") == "everywhere\n"
    own = cluster[1].hide(shared)
    cluster[1].run("bash", "-c", f"echo here > {shared}/file")
    assert cluster[0].run("cat", f"{shared}/file") == "everywhere\n" and (own / "file").read_text() == "here\n"
    cluster[1].restore(shared)
    cluster[1].replace(shared / "file", "replaced\n")
    assert [host.run("cat", f"{shared}/file") for host in cluster.hosts] == ["everywhere\n", "replaced\n"]
    for path in (shared / "file", Path("/etc/hosts")):
        cluster[1].restore(path)
    assert cluster[1].run("cat", f"{shared}/file") == "everywhere\n" and "node1" not in cluster[1].run("cat", "/etc/hosts")


def test_a_cable_is_cut_and_mended(cluster: Cluster) -> None:
    reach = ("timeout", "3", "bash", "-c", REACHES.format("node2"))
    cluster[0].run(*reach)
    cluster[1].cut()
    with pytest.raises(AssertionError, match="exit code (124|1)"):
        cluster[0].run(*reach)
    assert "NO-CARRIER" in cluster[1].run("ip", "link", "show", "eth0")
    cluster[1].run("bash", "-c", REACHES.format("10.77.0.2"))  # the host itself goes on
    cluster[1].mend()
    cluster[0].run("timeout", "20", "bash", "-c", f"until ({REACHES.format('node2')}) 2>&-; do sleep 0.1; done")


def test_a_host_that_is_killed_has_no_process_left(cluster: Cluster) -> None:
    sleeps = [host.popen(["setsid", "sleep", "1000"], Path("/")) for host in cluster.hosts]
    while not all(host.processes() for host in cluster.hosts):
        time.sleep(0.01)
    cluster[1].kill()
    assert cluster[1].processes() == [] and sleeps[1].wait(10) != 0
    assert [process.name() for process in cluster.processes()] == ["sleep"] and sleeps[0].poll() is None
    with pytest.raises(AssertionError, match="exit code (124|1)"):
        cluster[0].run("timeout", "3", "bash", "-c", REACHES.format("node2"))
    cluster[0].processes()[0].kill()
    cluster.wait_until_idle(10)
    assert sleeps[0].wait(10) != 0


@pytest.mark.parametrize("end", ["raises", "is killed"])
def test_nothing_is_left_of_a_cluster(end: str, hosts_can_be_made: None, tmp_path: Path) -> None:
    """Neither a process nor an interface, also if the process that made the cluster had no time to remove it."""
    interfaces = sorted(os.listdir("/sys/class/net"))
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", LEAVES_A_CLUSTER, tmp_path, end], stdout=subprocess.PIPE, text=True, env=environ) as owner:
        spaces = set(owner.stdout.readline().split())
        assert len(spaces) == 3
        if end == "is killed":
            assert len(members(spaces)) >= 9, "init, sleep and sshd of two hosts, the test's sleeps, the cluster's own"
            owner.send_signal(signal.SIGKILL)
        owner.wait(30)
    deadline = time.monotonic() + 30
    while alive := members(spaces):
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert sorted(os.listdir("/sys/class/net")) == interfaces


def members(spaces: set[str]) -> list[int]:
    """The numbers of the processes in these pid namespaces."""
    found = []
    for pid in psutil.pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") in spaces:
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_place_of_an_other_test_has_other_keys(tmp_path: Path, cluster: Cluster) -> None:
    """Two clusters at once do not meet: each has its own switch with the same addresses, and takes its own keys only."""
    (tmp_path / "other").mkdir()
    with Cluster(Place(tmp_path / "other")) as other:
        assert other[0].run("ssh", "node2", "echo $HOME") != cluster[0].run("ssh", "node2", "echo $HOME")
        assert other.pid_namespace != cluster.pid_namespace
