"""A launcher for tests: `python -S warm_launcher.py SOCKET launch.py …` runs launch.py in a fork of a server that has everything imported.

The launch has the command's arguments, environment, folder and output, and the command its exit code. Only the seconds of the imports are
saved. As a launcher, this file imports nothing but a little of Python's own library.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 60.0
"""Seconds in which the server must have imported everything."""
PRELOAD = ("torch", "deepspeed", "deepspeed.runtime.bf16_optimizer", "research.launch", "research.training.loop", "matplotlib.figure")


@contextlib.contextmanager
def warm_launcher(tree: Path) -> Iterator[str]:
    """The words of `--launcher` for launches of experiments in `tree`, whose code the server imports."""
    address = tree / "launcher.socket"
    environment = {**os.environ, "PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, __file__, str(address), "--serve"], cwd=tree, env=environment) as server:
        try:
            yield f"{sys.executable} -S {__file__} {address}"
        finally:
            server.kill()


def serve(address: str) -> None:
    """Imports everything, then forks a process for each connection. Whoever kills it kills them too."""
    import importlib
    import threading

    for name in PRELOAD:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            asked, files, _, _ = socket.recv_fds(connection, 2**20, 2)
            child = os.fork()
            if not child:
                listening.close()
                _launch(json.loads(asked), files)
            for file in files:
                os.close(file)
            threading.Thread(target=_answer, args=(connection, child), daemon=True).start()


def _answer(connection: socket.socket, child: int) -> None:
    _, status = os.waitpid(child, 0)
    with connection:
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _launch(asked: dict, files: list[int]) -> None:
    """Runs launch.py as `python launch.py` would; does not return."""
    import runpy

    from research.reliability.parents import PR_SET_PDEATHSIG, prctl

    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["words"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def ask(address: str, words: list[str]) -> int:
    """Has the server launch `words`, and waits; the exit code."""
    deadline = time.monotonic() + LIMIT
    with socket.socket(socket.AF_UNIX) as connection:
        while True:
            try:
                connection.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        asked = json.dumps({"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)})
        socket.send_fds(connection, [asked.encode()], [1, 2])
        return int(connection.recv(16))


if __name__ == "__main__":
    if sys.argv[2] == "--serve":
        serve(sys.argv[1])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
