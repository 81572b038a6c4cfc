"""The one thread that writes: it alone touches the Writer, takes orders from a queue and hands out what every step adds.

Orders may come from any thread and from a signal's handler (queue.SimpleQueue allows it). Nothing here knows of HTTP.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from parallel.errors import Mistake
from research.generation.batching import CANCELLED, END, STOP
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.settings import GenerationSettings
from research.serving.prometheus import Metrics

FAILED = "failed"
"""Why a text ended: the model could not go on."""


@dataclass(frozen=True)
class Token:
    """One token that was written, with its probabilities."""

    id: int
    start: int
    """Where in the text it begins, in characters."""
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What a step added to a text."""

    text: str
    tokens: tuple[Token, ...] = ()
    """Those whose text is out, where their probabilities were asked for; none of a stop string's, nor the end's."""
    count: int = 0
    """All tokens written so far."""
    finish: str | None = None
    error: str = ""
    """Where it failed: why."""


@dataclass(eq=False)
class Job:
    """A text to be written. The engine's thread fills the last two."""

    ids: tuple[int, ...]
    ask: GenerationSettings
    ends: Collection[int]
    text: GeneratedText | None = None
    told: int = field(default=0)
    """How many tokens have been handed out."""


class Submit(tuple[Job, ...]):
    """An order: write these, in one batch if there is room."""


class Cancel(tuple[Job, ...]):
    """An order: stop these, nobody wants them any more."""


class Halt:
    """An order: the last one."""


Order = Submit | Cancel | Halt
HandOut = Callable[[list[tuple[Job, Piece]]], None]
"""Takes the pieces of a step, in the engine's thread. A job's last piece has a `finish`."""


class Engine:
    """`run` until halted. Everything else may be called from other threads."""

    def __init__(self, writer: TextGenerator, hand_out: HandOut, metrics: Metrics) -> None:
        self.writer, self.hand_out, self.metrics = writer, hand_out, metrics
        self.orders: SimpleQueue[Order] = SimpleQueue()
        self._jobs: dict[GeneratedText, Job] = {}

    def run(self) -> None:
        """Carries out orders and writes, until Halt. An error that is no Mistake ends it, after all texts were told."""
        try:
            while self._take_orders():
                if self.writer:
                    self._step()
        except BaseException as error:
            self._fail(f"the server has met an error ({type(error).__name__})", clear=False)
            raise
        self._fail("the server is shutting down")

    def _take_orders(self) -> bool:
        """All that there are; waits for one where nothing is being written. False after Halt."""
        while True:
            self.metrics.rows(len(self.writer.scheduler.live), len(self.writer.scheduler.waiting))
            try:
                order = self.orders.get(block=not self.writer)
            except Empty:
                return True
            if isinstance(order, Halt):
                return False
            for job in order:
                self._begin(job) if isinstance(order, Submit) else self._cancel(job)

    def _begin(self, job: Job) -> None:
        try:
            job.text = self.writer.submit_ids(job.ids, job.ask, job.ends)
        except Mistake as mistake:
            self.hand_out([(job, Piece("", finish=FAILED, error=str(mistake)))])
            return
        self._jobs[job.text] = job

    def _cancel(self, job: Job) -> None:
        if job.text is not None and job.text in self._jobs:
            del self._jobs[job.text]
            self.writer.cancel(job.text)
            self.metrics.ended(CANCELLED)
            self.hand_out([(job, Piece("", count=len(job.text.generation.ids), finish=CANCELLED))])

    def _step(self) -> None:
        begun = time.perf_counter()
        try:
            moved = self.writer.step()
        except Mistake as mistake:  # what the model says is no number, on all ranks alike
            self._fail(str(mistake))
            return
        self.metrics.step(time.perf_counter() - begun, len(moved))
        self.hand_out([(self._jobs[text], self._piece(text, self._jobs[text])) for text in moved])
        for text in moved:
            if text.finish:
                self.metrics.ended(text.finish)
                del self._jobs[text]

    def _piece(self, text: GeneratedText, job: Job) -> Piece:
        ids, starts = text.generation.ids, text.starts
        tokens: tuple[Token, ...] = ()
        if job.ask.logprobs is not None:
            known = len(ids) - (text.finish == END)
            if text.finish in (None, STOP):
                known = next((i for i in range(job.told, known) if starts[i] >= len(text.text)), known)
            tokens = tuple(Token(ids[i], starts[i], *text.generation.logprobs[i]) for i in range(job.told, known))
            job.told = max(job.told, known)
        return Piece(text.fresh, tokens, len(ids), text.finish)

    def _fail(self, why: str, clear: bool = True) -> None:
        """Ends every text, and says why. The decoder is empty then, unless nobody knows what state it is in."""
        jobs, self._jobs = list(self._jobs.values()), {}
        if clear:
            self.writer.clear()
        for _ in jobs:
            self.metrics.ended(FAILED)
        self.hand_out([(job, Piece("", finish=FAILED, error=why)) for job in jobs])
