"""What a person reads while a run runs: the header, a line an interval, the end. Styled in a terminal, plain lines when piped.

The same characters either way; in a pipe no colour, no cursor movement and no wrapping, so that grep works. Rank 0's `Console`
writes, those of the other ranks are quiet.
"""

import functools
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO, TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from research.tracking import format as fmt

Row = Mapping[str, Any]
Item = TypeVar("Item")
WIDTHS = {"step": 5, "tokens": 9, "loss": 7, "ppl": 8, "lr": 9, "|g|": 6, "tokens/s": 10, "memory": 9, "eta": 7}
HEADER_INDENT, CLOSING_INDENT = 9, 7
Figure = tuple[str, str, float]
"""(task, metric, value)."""


class Advance(Protocol):
    """Says that n more of the total are done."""

    def __call__(self, n: int = 1, /) -> None: ...


def nothing(n: int = 1, /) -> None:
    """No bar to move."""


def counted(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    """The items; `advance` moves by one when the next is asked for."""
    for item in items:
        yield item
        advance(1)


class _RichConsole(rich.console.Console):
    """Goes on, unheard, when its reader has left: `| tee log` ends at a Ctrl-C before the run has saved."""

    def on_broken_pipe(self) -> None:
        """Later words, and those that are still in a buffer, go nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Console:
    """Rank 0's voice. Every method writes whole lines and flushes them."""

    def __init__(self, stream: TextIO | None = None, terminal: bool | None = None, quiet: bool = False):
        """Writes to `stream` (None: standard output as it is at each line); `terminal` None: ask the stream; `quiet`: nothing is written."""
        self._console = _RichConsole(file=stream, force_terminal=terminal, quiet=quiet, highlight=False, markup=False, emoji=False)
        if not quiet:
            _never_fail_on_a_letter(self._console.file)

    def header(self, lines: Sequence[tuple[str, str]]) -> None:
        """What was resolved, as (label, text) pairs; an empty label makes a title."""
        for label, text in lines:
            if label:
                self._labelled(label, text, HEADER_INDENT, "cyan")
            else:
                self._put(Text(text, "bold"))

    def columns(self) -> None:
        """The head of the table that `train` and `validation` fill, after an empty line."""
        self._put(Text())
        self._put(Text(columns_line(), "dim"))

    def train(self, row: Row, eta: float | None) -> None:
        """One interval of training; `row` has the keys of metrics.jsonl, `eta` is in seconds."""
        self._put(Text(train_line(row, eta)))

    def validation(self, row: Row, best: bool, saved: str | None = None) -> None:
        """One validation; `best`: the lowest so far; `saved`: what was written, e.g. 'step_000050 (0.2 s)'."""
        self._put(Text(validation_line(row, best, saved), "bold green" if best else "bold"))

    def evaluation(self, row: Row, figures: Sequence[Figure]) -> None:
        """The tasks, with one figure of each."""
        self._put(Text(evaluation_line(row, figures), "bold"))

    def saved(self, name: str, seconds: float) -> None:
        """A checkpoint on the way."""
        self._put(Text(f"{'saved':>{WIDTHS['step']}}  {name} ({seconds:.1f} s)", "dim"))

    def done(
        self, steps: int, planned: int, seconds: float, best: tuple[float, int] | None, skipped: int = 0, picture: str | None = None
    ) -> None:
        """The end; `best` is (bits per byte, step). A run that ended before `planned` steps says so."""
        label = "done" if steps >= planned else "ended"
        self._labelled(label, done_text(steps, planned, seconds, best, skipped, picture), CLOSING_INDENT, "bold green")

    def sample(self, prompt: str, text: str) -> None:
        """What the model writes after `prompt`, on one line."""
        self._labelled("sample", f"{fmt.one_line(prompt)} ▸ {fmt.one_line(text)}", CLOSING_INDENT, "cyan")

    def next(self, commands: Sequence[str]) -> None:
        """What to type next; never broken over lines, so that it can be copied."""
        for i, command in enumerate(commands):
            self._put(Text.assemble((f"{'' if i else 'next':<{CLOSING_INDENT}}", "cyan"), command))

    def warn(self, text: str) -> None:
        """Something that does not stop the run but should be read."""
        self._labelled("warn", fmt.one_line(text), CLOSING_INDENT, "bold yellow")

    @contextmanager
    def progress(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Around slow start-up work: a bar that vanishes, or one plain line. Yields `advance(n)`; total None: unknown."""
        if self._console.quiet or not self._console.is_terminal:
            self._put(Text(f"{label} …"))
            yield nothing
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*(columns if total else columns[:2]), console=self._console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield functools.partial(bar.advance, task)

    def _labelled(self, label: str, text: str, indent: int, style: str) -> None:
        """`label  text`; in a terminal, long text goes on under itself."""
        lines = [Text(text)]
        if self._console.is_terminal and self._console.width > 2 * indent:
            lines = list(Text(text).wrap(self._console, self._console.width - indent))
        for i, line in enumerate(lines):
            self._put(Text.assemble((f"{'' if i else label:<{indent}}", style), line))

    def _put(self, line: Text) -> None:
        if self._console.quiet:
            return
        try:
            self._console.print(line, soft_wrap=True)
            self._console.file.flush()
        except OSError:  # the terminal is gone
            self._console.on_broken_pipe()


def columns_line() -> str:
    """The table's head, each name at the right edge of its column."""
    return _aligned(WIDTHS)


def train_line(row: Row, eta: float | None) -> str:
    """One interval: step, tokens seen, loss, perplexity, learning rate, gradient norm, tokens a second, memory, time left."""
    cells = (
        f"{row['progress/step']}",
        fmt.count(row["progress/tokens"]),
        fmt.loss(row.get("train/loss")),
        fmt.perplexity(row.get("train/ppl")),
        fmt.rate(row.get("train/lr")),
        fmt.norm(row.get("train/grad_norm")),
        fmt.speed(row.get("perf/tokens_per_second")),
        fmt.memory(row.get("perf/memory_mb")),
        fmt.duration(eta),
    )
    return _aligned(cells)


def validation_line(row: Row, best: bool, saved: str | None) -> str:
    """One validation, under the same columns: tokens, loss, perplexity; then bits per byte, whether it is the best, what was saved."""
    cells = ("val", fmt.count(row["progress/tokens"]), fmt.loss(row["val/loss"]), fmt.perplexity(row["val/ppl"]))
    mark, kept = "↓ best" if best else "", f"saved {saved}" if saved else ""
    return f"{_aligned(cells)}  {fmt.loss(row['val/bits_per_byte'])} bits/byte {mark:6}  {kept}".rstrip()


def evaluation_line(row: Row, figures: Sequence[Figure]) -> str:
    """'eval     102 k  agreement accuracy 0.612 · wikitext word_perplexity 81.2', the name and the tokens under the columns' heads."""
    said = " · ".join(f"{fmt.one_line(task)} {metric} {fmt.figure(value)}" for task, metric, value in figures)
    return f"{_aligned(('eval', fmt.count(row['progress/tokens'])))}  {said}"


def done_text(steps: int, planned: int, seconds: float, best: tuple[float, int] | None, skipped: int, picture: str | None) -> str:
    """300 steps in 2:57 · best 2.021 bits/byte at step 300 · 0 skipped · loss.png."""
    parts = [f"{steps} {'step' if steps == 1 else 'steps'} in {fmt.duration(seconds)}"]
    if steps < planned:
        parts = [f"after {steps} of {planned} steps, {fmt.duration(seconds)}"]
    if best:
        parts.append(f"best {fmt.loss(best[0])} bits/byte at step {best[1]}")
    return " · ".join([*parts, f"{skipped} skipped", *([picture] if picture else [])])


def _aligned(cells: Any) -> str:
    """Right-aligned; a cell too wide for its column keeps one space before it."""
    line = ""
    for cell, width in zip(cells, WIDTHS.values(), strict=False):
        line += f"{cell:>{width}}" if len(cell) < width or not line else f" {cell}"
    return line


def _never_fail_on_a_letter(stream: Any) -> None:
    """A run must not end because the terminal's encoding has no '▸': such a letter is shown as '?'."""
    if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="replace")
