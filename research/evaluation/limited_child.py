"""The script that executes one generated program under limits; `limited_program.py` starts it. Uses the standard library only.

It reads a request from standard input and writes an outcome to standard output, both as JSON:

    {"program": "def f(): …", "cpu_seconds": 5, "wall_seconds": 20.0, "memory": 1073741824, "restrictions": ["files", "processes"]}
    {"passed": false, "timed_out": true, "said": "more than 5 s of CPU time", "restrictions": ["files", "processes"]}

The script is two processes. The first keeps the time, and in the end kills whatever is left. The second gives up its rights, and executes
the program in itself. A program has passed if it was executed to its end: neither its exit code nor what it prints counts.

This is not a security boundary. It keeps mistakes and accidents of a model from doing harm.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

FILES, PROCESSES = "files", "processes"
"""The restrictions that the kernel may lack: Landlock, and a filter of system calls."""
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SECCOMP_MODE_FILTER = 2
MOST_PROCESSES = 16
"""How many processes a program may have started before it is ended, if the kernel does not forbid it to start any.

RLIMIT_NPROC is of no use here: it counts all processes of a user, and root is exempt from it.
"""
POLL_SECONDS = 0.02
OPEN_FILES = 64
LONGEST_SAID = 200
C = ctypes.CDLL(None)

LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446
"""Numbers of system calls; from 424 on, they are the same on every machine."""
WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 13))
"""Landlock's rights to write to a file, and to remove or make a file, folder, link, pipe, socket or device; known since ABI 1."""
LATER_WRITES = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""ABI -> a right that is known since: to move a file to another folder, to truncate it, to control a device."""
TCP, ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11
"""Landlock's rights to bind and connect (since ABI 4); its scopes, outside of which a process cannot reach (since ABI 6)."""

AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
"""What no program may call: name -> number on x86_64 and aarch64; None: there is none.

They start processes, make sockets, reach other processes, change what files are beside their content, or make what outlives a process.
"""
CLONE, CLONE3, TGKILL, PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
"""Calls of which some are allowed: threads, a signal to the process itself, limits of the process itself."""
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
"""What a filter returns: the call is made, or fails with this error."""
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the kernel's struct seccomp_data."""
X32 = 0x40000000
"""The numbers of x86_64's second set of system calls begin here."""


def main() -> None:
    """Executes the program of the request and writes its outcome."""
    C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    C.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what the program leaves behind becomes a child of this process
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    json.dump(outcome(json.load(sys.stdin.buffer)), sys.stdout)


# The process that keeps the time


class TookTooMuch(Exception):
    """Raised when the program has to be ended; says why."""


class TookTooLong(TookTooMuch):
    """Raised when the time by the clock is over."""


def outcome(request: dict[str, Any]) -> dict[str, Any]:
    """Executes the program in a child. When this returns, neither the child nor anything that it has started is left."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    secret = os.urandom(16).hex()  # so that what a program writes there by chance is not taken for a message
    deadline = time.monotonic() + request["wall_seconds"]
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_program(request, secret, writing)
    os.close(writing)
    select.select([reading], [], [], request["wall_seconds"])
    messages = _messages(reading, secret)
    restrictions = messages[0] if messages else []
    found = {"passed": False, "timed_out": False, "restrictions": restrictions}
    try:
        status = _wait(child, deadline, POLL_SECONDS if PROCESSES not in restrictions else math.inf)
    except TookTooMuch as error:
        return {**found, "timed_out": isinstance(error, TookTooLong), "said": str(error)}
    finally:
        _kill_descendants()
    said = (messages + _messages(reading, secret))[1:]
    if said:
        return {**found, "passed": said == [""], "said": said[0]}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {**found, "timed_out": True, "said": f"more than {request['cpu_seconds']} s of CPU time"}
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
    return {**found, "said": f"ended before its tests did ({how})"}


def _wait(child: int, deadline: float, interval: float) -> int:
    """The wait status of the child. Looks every `interval` seconds how many processes there are. SIGTERM ends the waiting."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        left = deadline - time.monotonic()
        if left <= 0:
            raise TookTooLong("more time by the clock than it had")
        if len(_descendants()) > MOST_PROCESSES:
            raise TookTooMuch(f"more than {MOST_PROCESSES} processes")
        received = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, min(left, interval))
        if received is not None and received.si_signo == signal.SIGTERM:
            raise TookTooMuch("the evaluation was ended")


def _descendants() -> list[int]:
    """The ids of the processes that descend from this one. Orphans are among them, because this process is their subreaper."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found: list[int] = []
    generation = {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found += generation
    return found


def _kill_descendants() -> None:
    """Kills every descendant and reads its exit code, until none is left."""
    while left := _descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _messages(reading: int, secret: str) -> list[Any]:
    """What the child has reported: the restrictions in effect, and after the program's end the error, "" for none."""
    try:
        lines = os.read(reading, 2**16).decode("ascii", "replace").split("\n")
    except BlockingIOError:  # there is nothing yet, or a process that cannot be killed holds the pipe
        return []
    return [json.loads(line.removeprefix(secret)) for line in lines if line.startswith(secret)]


# The process that executes the program


def _be_program(request: dict[str, Any], secret: str, writing: int) -> NoReturn:
    """The child's whole life."""
    write, end = os.write, os._exit  # the program may replace them
    try:
        C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        in_effect = restrict(request)
        write(writing, f"{secret}{json.dumps(in_effect)}\n".encode())
        said = json.dumps(error_of(request["program"]))
        write(writing, f"{secret}{said}\n".encode())
    finally:
        end(0)


def error_of(program: str) -> str:
    """Executes the program; returns the name of the error that ends it, or "" if it comes to its end. `sys.exit` is an error here."""
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), {})
    except BaseException as error:
        return type(error).__name__[:LONGEST_SAID]
    return ""


def restrict(request: dict[str, Any]) -> list[str]:
    """Takes rights and means from this process for good. Returns those of the requested restrictions that the kernel has granted."""
    C.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    cpu = request["cpu_seconds"]
    for limit, value in {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (request["memory"],) * 2,
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }.items():
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, value if hard == resource.RLIM_INFINITY else tuple(min(part, hard) for part in value))
    ways = {FILES: _forbid_writing, PROCESSES: _filter_system_calls}
    return [name for name in request["restrictions"] if ways[name]()]


def _drop_capabilities() -> None:
    """Root keeps what its files' modes give it, and may no longer shut down, mount or trace."""
    version_3, this_process, none = 0x20080522, 0, [0] * 6
    C.capset((ctypes.c_uint32 * 2)(version_3, this_process), (ctypes.c_uint32 * 6)(*none))


def _forbid_writing() -> bool:
    """No file can be opened for writing, made, renamed or removed, by Landlock; whether the kernel does it.

    Newer kernels also refuse TCP, and signals to other processes.
    """
    abi = C.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    writes = WRITES | sum(right for since, right in LATER_WRITES.items() if abi >= since)
    rights = (ctypes.c_uint64 * 3)(writes, TCP if abi >= 4 else 0, ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0)
    size = 8 * (3 if abi >= 6 else 2 if abi >= 4 else 1)  # an older kernel has fewer fields
    ruleset = C.syscall(LANDLOCK_CREATE, rights, ctypes.c_size_t(size), 0)
    return ruleset >= 0 and C.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0


def _filter_system_calls() -> bool:
    """SYSTEM_CALLS fail with EPERM, by seccomp; whether the kernel does it."""
    machine = platform.machine()
    if machine not in AUDIT_ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    program = filter_program(machine, os.getpid())
    instructions = ctypes.create_string_buffer(b"".join(program), 8 * len(program))
    header = struct.pack("@HP", len(program), ctypes.addressof(instructions))
    return C.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0


def filter_program(machine: str, pid: int) -> list[bytes]:
    """The instructions of the filter, for process `pid`: each is operation, instructions to skip if true and if false, operand."""

    def instruction(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, if_true, if_false, operand)

    def refuse(number: int, error: int = EPERM) -> list[bytes]:
        return [instruction(EQUAL, number, 0, 1), instruction(RETURN, error)]

    def allow_if(number: int, test: int, operand: int) -> list[bytes]:  # the first argument must pass the test
        argument, passes = instruction(LOAD, FIRST_ARGUMENT), instruction(test, operand, 0, 1)
        return [instruction(EQUAL, number, 0, 4), argument, passes, instruction(RETURN, ALLOW), instruction(RETURN, EPERM)]

    column = list(AUDIT_ARCHITECTURES).index(machine)
    numbers = [number for calls in SYSTEM_CALLS.values() if (number := calls[column]) is not None]
    return [
        *(instruction(LOAD, ARCHITECTURE), instruction(EQUAL, AUDIT_ARCHITECTURES[machine], 1, 0), instruction(RETURN, EPERM)),
        *(instruction(LOAD, NUMBER), instruction(AT_LEAST, X32, 0, 1), instruction(RETURN, EPERM)),
        *(part for number in numbers for part in refuse(number)),
        *refuse(CLONE3[column], ENOSYS),  # its flags are out of a filter's reach; libraries then use clone
        *allow_if(CLONE[column], ANY_BIT, CLONE_THREAD),
        *allow_if(TGKILL[column], EQUAL, pid),
        *allow_if(PRLIMIT[column], EQUAL, 0),
        instruction(RETURN, ALLOW),
    ]


if __name__ == "__main__":
    main()
