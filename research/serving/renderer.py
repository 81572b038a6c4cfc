"""Asks the sandbox's process to lay out a conversation, and starts another one where it is late."""

import json
import multiprocessing
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from research.serving import sandbox
from research.serving.refusal import wrong

START = 20.0
"""Seconds for a new process to begin: an interpreter on a busy machine."""


class Renderer:
    """One template. Any thread may call; one conversation is laid out at a time. `close` ends the process."""

    def __init__(self, source: str, seconds: float) -> None:
        self.source, self.seconds = source, seconds
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._line: Connection | None = None

    def render(self, told: dict[str, Any]) -> str:
        """The text; a Refusal of `messages` where the template refuses them, fails or takes too long."""
        with self._lock:
            answer = self._answer(told)
        if "error" in answer:
            raise wrong("messages", f"are refused by the chat template ({answer['error']}) → send what it asks for", "template_error")
        return answer["text"]

    def close(self) -> None:
        """No more conversations."""
        with self._lock:
            self._end()

    def _answer(self, told: dict[str, Any]) -> dict[str, Any]:
        line = self._line or self._begin()
        try:
            line.send_bytes(json.dumps(told).encode())
            if line.poll(self.seconds):
                return json.loads(line.recv_bytes())
            late = f"it took more than {self.seconds:g} s"
        except (EOFError, OSError):
            late = "it has brought its process down"
        self._end()
        return {"error": late}

    def _begin(self) -> Connection:
        """A fresh interpreter, which has begun when it has laid out nothing."""
        self._end()
        spawn = multiprocessing.get_context("spawn")
        self._line, theirs = spawn.Pipe()
        self._process = spawn.Process(target=sandbox.serve, args=(self.source, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._line.send_bytes(b'{"messages": []}')
        if self._line.poll(START):
            self._line.recv_bytes()
        return self._line

    def _end(self) -> None:
        if self._process is not None and self._line is not None:
            self._line.close()
            self._process.kill()
            self._process.join()
        self._process = self._line = None
