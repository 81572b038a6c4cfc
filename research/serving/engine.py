"""The engine: the one thread that uses the TextGenerator. It takes commands from a queue and reports what each step generated.

Commands may come from any thread and from a signal handler, which queue.SimpleQueue allows. This module knows nothing of HTTP.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from parallel.errors import Mistake
from research.generation.batching import CANCELLED, END, STOP
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.settings import GenerationSettings
from research.serving.prometheus import Metrics

FAILED = "failed"
"""The finish reason of a text that could not be completed because of an error."""


@dataclass(frozen=True)
class Token:
    """A generated token with its log-probability."""

    id: int
    start: int
    """Position of its first character in the generated text."""
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability) of the likeliest tokens at this position."""


@dataclass(frozen=True)
class Piece:
    """What one step added to a text."""

    text: str
    tokens: tuple[Token, ...] = ()
    """The tokens whose text has been sent, if log-probabilities were requested. Tokens of a stop string and the end token are left out."""
    count: int = 0
    """Number of tokens generated so far."""
    finish: str | None = None
    error: str = ""
    """The reason, if `finish` is FAILED."""


@dataclass(eq=False)
class Job:
    """A text to be generated. The engine's thread sets `text` and `reported`."""

    ids: tuple[int, ...]
    settings: GenerationSettings
    end_ids: Collection[int]
    text: GeneratedText | None = None
    reported: int = 0
    """Number of tokens that were passed on with their log-probabilities."""


class Submit(tuple[Job, ...]):
    """A command: generate these texts, in one batch if there is room."""


class Cancel(tuple[Job, ...]):
    """A command: stop these texts."""


class Halt:
    """A command: end the engine."""


Command = Submit | Cancel | Halt
Deliver = Callable[[list[tuple[Job, Piece]]], None]
"""Receives the pieces of a step, in the engine's thread. The last piece of a job has a `finish`."""


class Engine:
    """Generates the texts of all jobs in one batch. `run` returns after Halt; other threads only put commands into the queue."""

    def __init__(self, generator: TextGenerator, deliver: Deliver, metrics: Metrics) -> None:
        self.generator, self.deliver, self.metrics = generator, deliver, metrics
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self._jobs: dict[GeneratedText, Job] = {}

    def run(self) -> None:
        """Executes commands and generates until Halt. Any error but a Mistake ends it, after every unfinished text has failed."""
        try:
            while self._execute_commands():
                if self.generator:
                    self._step()
        except BaseException as error:
            # the state of the decoder is unknown here, so it is not cleared
            self._fail_all(f"the server has met an error ({type(error).__name__})", clear=False)
            raise
        self._fail_all("the server is shutting down")

    def _execute_commands(self) -> bool:
        """Executes all commands in the queue; waits for one if no text is being generated. Returns False after Halt."""
        while True:
            self.metrics.batch(len(self.generator.scheduler.live), len(self.generator.scheduler.waiting))
            try:
                command = self.commands.get(block=not self.generator)
            except Empty:
                return True
            if isinstance(command, Halt):
                return False
            for job in command:
                self._submit(job) if isinstance(command, Submit) else self._cancel(job)

    def _submit(self, job: Job) -> None:
        try:
            job.text = self.generator.submit_ids(job.ids, job.settings, job.end_ids)
        except Mistake as mistake:
            self.deliver([(job, Piece("", finish=FAILED, error=str(mistake)))])
            return
        self._jobs[job.text] = job

    def _cancel(self, job: Job) -> None:
        if job.text is not None and job.text in self._jobs:
            del self._jobs[job.text]
            self.generator.cancel(job.text)
            self.metrics.text_ended(CANCELLED)
            self.deliver([(job, Piece("", count=len(job.text.generation.ids), finish=CANCELLED))])

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            texts = self.generator.step()
        except Mistake as mistake:  # the logits are not finite; all ranks raise it
            self._fail_all(str(mistake))
            return
        self.metrics.step(time.perf_counter() - started, len(texts))
        self.deliver([(self._jobs[text], self._piece(text, self._jobs[text])) for text in texts])
        for text in texts:
            if text.finish:
                self.metrics.text_ended(text.finish)
                del self._jobs[text]

    def _piece(self, text: GeneratedText, job: Job) -> Piece:
        ids, starts = text.generation.ids, text.starts
        tokens: tuple[Token, ...] = ()
        if job.settings.logprobs is not None:
            stop = len(ids) - (text.finish == END)
            if text.finish in (None, STOP):
                stop = next((i for i in range(job.reported, stop) if starts[i] >= len(text.text)), stop)
            tokens = tuple(Token(ids[i], starts[i], *text.generation.logprobs[i]) for i in range(job.reported, stop))
            job.reported = max(job.reported, stop)
        return Piece(text.fresh, tokens, len(ids), text.finish)

    def _fail_all(self, error: str, clear: bool = True) -> None:
        """Ends every text with `error`, and with `clear` frees the decoder's slots."""
        jobs, self._jobs = list(self._jobs.values()), {}
        if clear:
            self.generator.clear()
        for _ in jobs:
            self.metrics.text_ended(FAILED)
        self.deliver([(job, Piece("", finish=FAILED, error=error)) for job in jobs])
