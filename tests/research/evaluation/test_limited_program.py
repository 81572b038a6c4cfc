"""Programs of a model in limited processes: what they may not do, that they end in time as failed, and that nothing is left of them."""

import contextlib
import os
import socket
import struct
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from research.evaluation import limited_child
from research.evaluation.limited_child import ALLOW, ENOSYS, EPERM, SYSTEM_CALLS, filter_program
from research.evaluation.limited_program import RESTRICTIONS, Limits, Outcome, run_programs

ALL = tuple(RESTRICTIONS)
SHORT = 0.3
"""Seconds by the clock of a program that has to be ended. The others have the default: a loaded machine changes no outcome."""
BOMB = "import os, time\nfor _ in range(8):\n    os.fork()\n    time.sleep(0.05)\ntime.sleep(60)"
"""Doubles twenty times a second, up to 256 processes. In the time that it gets, it does not come that far."""
KILLS_ITS_PARENT = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(60)"
LEAVES_A_CHILD = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(60)"
"""Passes, but for two processes with a session of their own."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the programs' working directories are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes(place: Path) -> list[int]:
    """The processes that work in a folder there, whether or not it has been removed."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # it has ended
            found += [process.pid] if os.readlink(f"/proc/{process.pid}/cwd").startswith(str(place)) else []
    return found


def run(program: str, **limits) -> Outcome:
    ((_, outcome),) = run_programs([program], Limits(**limits))
    return outcome


FAIL = {  # what a program does -> the program, its limits, and how it ends
    "a wrong answer": ("assert 1 == 2", {}, "AssertionError"),
    "no Python": ("def f(:", {}, "SyntaxError"),
    "an endless loop": ("while True: pass", {"wall_seconds": SHORT}, "more time by the clock than it had"),
    "a wait": ("import time\ntime.sleep(60)", {"wall_seconds": SHORT}, "more time by the clock than it had"),
    "10 GB": ("bytearray(10 * 10**9)", {}, "MemoryError"),
    "a fork bomb": (BOMB, {}, "PermissionError"),
    "a fork bomb that may fork": (BOMB, {"restrictions": ("files",)}, "more than 16 processes"),
    "a child": (LEAVES_A_CHILD, {}, "PermissionError"),
    "a command": ("import subprocess\nsubprocess.run(['true'])", {}, "PermissionError"),
    "a signal to its parent": ("import os\nos.kill(os.getppid(), 9)", {}, "PermissionError"),
    "its parent's end": (KILLS_ITS_PARENT, {"restrictions": ()}, "the process that limits the program has failed"),
    "a new file": ("open('new', 'w')", {}, "PermissionError"),
    "a byte in a new file": ("with open('new', 'w') as file: file.write('x')", {"restrictions": ()}, "OSError"),
    "success before the tests": ("import sys\nsys.exit(0)", {}, "SystemExit"),
    "a hard exit before the tests": ("import os\nos._exit(0)", {}, "ended before its tests did (exit code 0)"),
    "an abort": ("import os\nos.abort()", {}, "ended before its tests did (signal 6)"),
    "its descriptors closed": ("import os\nos.closerange(0, 99)", {}, "ended before its tests did (exit code 0)"),
    "a question": ("input()", {}, "EOFError"),
    "an installed package": ("import numpy", {}, "ModuleNotFoundError"),
    "endless output": ("while True: print('passed' * 10**4)", {"wall_seconds": SHORT}, "more time by the clock than it had"),
    "words to whoever listens": (
        """
import os
for descriptor in range(1, 99):
    for words in (b'passed', b'[]\\n""\\n', b'{"passed": true, "timed_out": false, "said": "", "restrictions": []}'):
        try:
            os.write(descriptor, words + b'\\n')
        except OSError:
            pass
os._exit(0)
""", {}, "ended before its tests did (exit code 0)",
    ),
}  # fmt: skip


def alike() -> dict[str, list[str]]:
    """What the programs of FAIL do, by their limits."""
    found: dict[str, list[str]] = {}
    for what, (_, limits, _) in FAIL.items():
        found.setdefault(", ".join(f"{name} {value}" for name, value in limits.items()), []).append(what)
    return found


@pytest.mark.parametrize("limits", alike())
def test_they_fail_in_time_and_nothing_is_left(limits: str, place: Path) -> None:
    names = alike()[limits]
    limited = FAIL[names[0]][1]
    found = {names[i]: outcome for i, outcome in run_programs([FAIL[what][0] for what in names], Limits(**limited), at_once=4)}
    assert {what: (outcome.passed, outcome.said) for what, outcome in found.items()} == {what: (False, FAIL[what][2]) for what in names}
    for what, outcome in found.items():
        assert outcome.timed_out == ("wall_seconds" in limited)
        if what != "its parent's end" and not outcome.timed_out:  # otherwise it may be that this has not been told
            assert set(outcome.restrictions) == set(limited.get("restrictions", ALL))
    ends = time.monotonic() + 10  # what the kernel ends because its parent has, it ends a moment later
    while processes(place) and "its parent's end" in names and time.monotonic() < ends:
        time.sleep(0.01)
    assert processes(place) == [] and list(place.iterdir()) == []


@pytest.mark.slow
def test_cpu_time_is_limited_too() -> None:
    outcome = run("while True: pass", cpu_seconds=1, wall_seconds=600.0)
    assert outcome.timed_out and outcome.said == "more than 1 s of CPU time"


def test_what_is_right_passes() -> None:
    program = """
import asyncio, collections, decimal, hashlib, heapq, itertools, json, math, os, random, re, statistics, string, sys, threading, typing
print("any output")
thread = threading.Thread(target=print)
thread.start()
thread.join()
asyncio.run(asyncio.sleep(0))
assert set(os.environ) <= {"PYTHONHASHSEED", "LC_CTYPE"} and os.listdir() == []
assert [place for place in sys.path if "site-packages" in place] == []
assert __name__ != "__main__"
"""
    assert run(program) == Outcome(True, False, "", ALL)


def test_what_it_has_given_up() -> None:
    """Capabilities (also root's), set-user-ID programs, cores, all but 64 open files and 1 GiB, local sockets, tracing, priorities."""
    program = """
import ctypes, os, resource, socket
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "NoNewPrivs")] == [0, 0, 0, 1], status
assert resource.getrlimit(resource.RLIMIT_CORE) == resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_AS) == (2**30, 2**30)
refused = [lambda: socket.socket(socket.AF_UNIX), lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU), lambda: os.nice(1)]
for call in refused:
    try:
        call()
    except PermissionError:
        continue
    raise AssertionError
assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == -1
descriptors = []
try:
    while len(descriptors) < 100:
        descriptors.append(os.dup(0))
except OSError:
    assert 50 < len(descriptors) < 64
else:
    raise AssertionError
"""
    assert run(program) == Outcome(True, False, "", ALL)


def test_the_order_of_a_set_is_the_same_each_time() -> None:
    program = "order = ''.join({str(i) for i in range(30)})\nraise type(f'O{order}', (Exception,), {})"
    assert len({outcome.said for _, outcome in run_programs([program] * 2, Limits())}) == 1


def test_a_child_that_it_may_leave_behind_is_killed(place: Path) -> None:
    assert run(LEAVES_A_CHILD, restrictions=()).passed and processes(place) == []


CHANGES = [
    *("open(path, 'w')", "open(path, 'a')", "open(path, 'r+')", "os.open(path, os.O_TRUNC)", "os.truncate(path, 0)"),
    *("os.remove(path)", "os.rename(path, path + '2')", "os.mkdir(path + '2')", "os.symlink('x', path + '2')", "os.link(path, path + '2')"),
    *("os.chmod(path, 0)", "os.utime(path, (0, 0))", "os.setxattr(path, 'user.x', b'')", "os.rmdir(folder)", "os.mkfifo(path + '2')"),
]


def test_files_outside_stay_as_they_are(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("outside")
    path, empty = folder / "file", folder / "empty"
    path.write_text("kept")
    empty.mkdir()
    before = path.stat()
    program = f"""
import os
path, folder = {str(path)!r}, {str(empty)!r}
assert open(path).read() == "kept"
for change in {CHANGES}:
    try:
        exec(change)
    except PermissionError:
        continue
    raise type(change, (Exception,), {{}})
"""
    outcome = run(program)
    assert outcome.passed, outcome.said
    after = path.stat()
    assert path.read_text() == "kept" and (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)
    assert set(folder.iterdir()) == {path, empty}


@pytest.mark.parametrize("restriction", ALL)
def test_there_is_no_network(restriction: str) -> None:
    """Either means is enough, on a kernel whose Landlock knows TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = run(f"import socket\nsocket.create_connection({server.getsockname()!r})", restrictions=(restriction,))
        assert outcome.said == "PermissionError"
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_several_run_at_a_time_and_an_early_end_ends_all(place: Path) -> None:
    """Three that wait for ever, and one that ends: with fewer than four at a time, it would not."""
    programs = run_programs(["import time\ntime.sleep(60)"] * 3 + [""], Limits(), at_once=4)
    index, outcome = next(programs)
    assert index == 3 and outcome.passed and len(processes(place)) >= 3
    programs.close()
    assert processes(place) == []


def verdict(instructions: list[bytes], machine: int, number: int, argument: int = 0) -> int:
    """What a filter returns for a system call: the kernel's classic BPF, as far as the filter uses it."""
    data = struct.pack("=iIQ6Q", number, machine, 0, argument, 0, 0, 0, 0, 0)
    value, place = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack("=HBBI", instructions[place])
        if code == 0x06:
            return operand
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
            place += 1
        else:
            true = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            place += 1 + (if_true if true else if_false)


@pytest.mark.parametrize(("machine", "read", "clone", "tgkill"), [("x86_64", 0, 56, 234), ("aarch64", 63, 220, 131)])
def test_the_filter_of_each_machine(machine: str, read: int, clone: int, tgkill: int) -> None:
    column, this = list(limited_child.AUDIT_ARCHITECTURES).index(machine), limited_child.AUDIT_ARCHITECTURES[machine]
    instructions = filter_program(machine, pid=77)
    refused = {number for calls in SYSTEM_CALLS.values() if (number := calls[column]) is not None}
    special = {clone, tgkill, limited_child.CLONE3[column], limited_child.PRLIMIT[column]}
    assert len(instructions) < 4096 and not refused & special and read not in refused
    for number in set(range(500)) - special:
        assert verdict(instructions, this, number) == (EPERM if number in refused else ALLOW)
    assert verdict(instructions, this, 435) == ENOSYS
    assert [verdict(instructions, this, clone, flags) for flags in (0x10000, 0x3D0F00, 0x1200011, 17)] == [ALLOW, ALLOW, EPERM, EPERM]
    assert [verdict(instructions, this, tgkill, pid) for pid in (77, 78)] == [ALLOW, EPERM]
    assert verdict(instructions, this ^ 1, read) == verdict(instructions, this, 0x40000000 + read) == EPERM
