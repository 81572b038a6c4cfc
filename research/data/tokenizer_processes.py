"""Tokenizes groups of text in processes of their own, in order. Whatever their number, the ids are the same.

A process that is interrupted together with its parent (Ctrl-C) leaves that to it, and ends when the parent does, however that ends.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from parallel.errors import Mistake
from research.data import tokenizer, tokenizer_file
from research.data.rendered_text import ExampleEncoder, RenderedText
from research.data.tokenizer import Tokenizer

AHEAD = 2
"""Groups per process that are read before they are tokenized."""
Tag = TypeVar("Tag")
Text = TypeVar("Text", str, RenderedText)


def open_tokenizer(name: str, file: Path) -> Tokenizer:
    """The tokenizer whose tokenizer.json is `file`, called `name`, as the user called it. A built-in one is faster than its file alone."""
    if name.startswith("builtin:"):
        return tokenizer.from_json(name, file.read_text(encoding="utf-8"))
    return dataclasses.replace(tokenizer_file.load(str(file), Path()), name=name)


def encoded(
    groups: Iterable[tuple[list[Text], Tag]], name: str, file: Path, processes: int, of_examples: bool = False
) -> Iterator[tuple[list[np.ndarray], Tag]]:
    """The ids of each text of each group, or of rendered texts the ids and masks '2 n', and the group's tag, in order.

    One process: this one, with the library's own threads.
    """
    if processes == 1:
        own = _encoder(name, file, of_examples)
        yield from ((own.encode_arrays(texts), tag) for texts, tag in groups)
        return
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[_Child] = SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_Child(_tokenize, name, str(file), of_examples)))
        threads = ThreadPoolExecutor(processes)
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)

        def request(texts: list[Text]) -> list[np.ndarray]:
            child = idle.get()
            try:
                return child.request(texts)
            finally:
                idle.put(child)

        pending: deque[tuple[Future[list[np.ndarray]], Tag]] = deque()
        for texts, tag in groups:
            pending.append((threads.submit(request, texts), tag))
            while len(pending) >= AHEAD * processes:
                first, its_tag = pending.popleft()
                yield first.result(), its_tag
        for first, its_tag in pending:
            yield first.result(), its_tag


def made_in_process(name: str, texts: Iterable[str]) -> str:
    """`tokenizer.made_from` of a text that need not fit into memory, in a process that can be ended at any moment."""
    with _Child(_make, name) as child:
        for text in texts:
            child.send(text)
        return child.request(None)


class _Child:
    """A process that runs `function(connection, *arguments)`, and is killed when it is left."""

    def __init__(self, function: Any, *arguments: str | bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: it is this process that handles Ctrl-C
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def send(self, value: Any) -> None:
        """Sends a value. A Mistake if the process has ended."""
        try:
            self.connection.send(value)
        except OSError:
            self._end()

    def request(self, value: Any) -> Any:
        """The answer to a value. A Mistake of the process is raised here."""
        self.send(value)
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self._end()
        if isinstance(answer, Mistake):
            raise answer
        return answer

    def _end(self) -> None:
        self.process.join(1)
        code = self.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        raise Mistake(f"a process that tokenizes has ended {how} → if memory was short, use fewer of them: --workers 1")


def _encoder(name: str, file: Path, of_examples: bool) -> Any:
    """The tokenizer, or what encodes rendered texts with it: both have `encode_arrays`."""
    own = open_tokenizer(name, file)
    return ExampleEncoder(own) if of_examples else own


def _tokenize(connection: Connection, name: str, file: str, of_examples: bool) -> None:
    """Answers each list of texts with the ids of each."""
    own = _encoder(name, Path(file), of_examples)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            texts = connection.recv()
            try:
                connection.send(own.encode_arrays(texts))
            except Mistake as mistake:
                connection.send(mistake)


def _make(connection: Connection, name: str) -> None:
    """Answers the texts, up to None, with the tokenizer made from them."""
    with contextlib.suppress(EOFError, OSError):
        connection.send(tokenizer.made_from(name, iter(connection.recv, None)))
