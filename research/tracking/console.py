"""Prints what a person reads while a run trains: the header, one table row per interval, validations, the end.

The characters are the same in a terminal and in a pipe. A terminal also gets colour and a progress bar; a pipe gets no escape
sequences and no wrapping, so that grep works, and instead of the bar a line every half minute. Rank 0's `Console` prints; those of
the other ranks are quiet.
"""

import copy
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol, TextIO, TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from parallel.text import printable
from research.tracking import format as fmt
from research.tracking.streams import escape_unencodable, without_escaping

Row = Mapping[str, Any]
Item = TypeVar("Item")
WIDTHS = {"step": 5, "tokens": 9, "loss": 7, "ppl": 8, "lr": 9, "|g|": 6, "tokens/s": 10, "memory": 9, "added": 9, "eta": 7}
VAL_OF_SOURCE = re.compile("val/([^/]+)/loss")
"""The key of a source's own validation."""
HEADER_INDENT, CLOSING_INDENT = 9, 7
PIPE_SECONDS = 30.0
"""Time between two lines of progress where there is no terminal for a bar."""
Figure = tuple[str, str, float]
"""(task, metric, value)."""


class Advance(Protocol):
    """Moves a progress bar by n."""

    def __call__(self, n: int = 1, /) -> None: ...


def nothing(n: int = 1, /) -> None:
    """The `Advance` for which there is no progress bar."""


def counted(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    """The items; `advance` is called when the next one is asked for."""
    for item in items:
        yield item
        advance(1)


class TerminalConsole(rich.console.Console):
    """Becomes quiet when its reader has left, instead of raising: `| tee log` ends at a Ctrl-C before the run has saved."""

    @property
    def file(self) -> IO[str]:
        """The stream, without the escaping of what steers a terminal: rich's own colours and bars do. Text in it is `printable`."""
        return without_escaping(super().file)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def on_broken_pipe(self) -> None:
        """Discards further output, and what is still in a buffer."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def show_tables(tables: Sequence[Table]) -> None:
    """Prints tables on standard output, with an empty line after each: as wide as the terminal, 80 columns in a pipe.

    Their cells may hold what another machine says of itself, such as its name: each of their lines is shown as `one_line` writes it.
    """
    console = TerminalConsole(file=sys.stdout, highlight=False, markup=False, emoji=False)
    escape_unencodable(console.file)
    for table in tables:
        console.print(_printable_table(table))
        console.print()


def _printable_table(table: Table) -> Table:
    """A copy of the table whose cells steer no terminal: texts, and `Text` of one style."""
    safe = copy.copy(table)
    safe.columns, safe.rows = [column.copy() for column in table.columns], []
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        safe.add_row(*map(_printable_cell, cells), style=row.style, end_section=row.end_section)
    return safe


def _printable_cell(cell: Any) -> Text:
    """The cell with its newlines, between which a table puts lines of its own."""
    text, style = (cell.plain, cell.style) if isinstance(cell, Text) else (str(cell), "")
    return Text("\n".join(map(fmt.one_line, text.split("\n"))), style)


class Console:
    """The terminal output of a run. Every method writes whole lines and flushes them."""

    def __init__(self, stream: TextIO | None = None, terminal: bool | None = None, quiet: bool = False):
        """Writes to `stream` (None: standard output as it is at each line). `terminal`: whether it is one (None: the stream tells).

        `quiet`: nothing is written.
        """
        self._console = TerminalConsole(file=stream, force_terminal=terminal, quiet=quiet, highlight=False, markup=False, emoji=False)
        if not quiet:
            escape_unencodable(self._console.file)  # a sign that the encoding lacks must not end a run

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 in a pipe, unless COLUMNS says otherwise."""
        return self._console.width

    def header(self, lines: Sequence[tuple[str, str]]) -> None:
        """What was resolved, as (label, text) pairs; an empty label makes a title."""
        for label, text in lines:
            if label:
                self._labelled(label, text, HEADER_INDENT, "cyan")
            else:
                self._put(Text(printable(text), "bold"))

    def columns(self) -> None:
        """The head of the table that `train` and `validation` fill, after an empty line."""
        self._put(Text())
        self._put(Text(_aligned(WIDTHS), "dim"))

    def train(self, row: Row, eta: float | None) -> None:
        """One interval of training; `row` has the keys of metrics.jsonl, `eta` is in seconds."""
        cells = (
            f"{row['progress/step']}",
            fmt.count(row["progress/tokens"]),
            fmt.loss(row.get("train/loss")),
            fmt.perplexity(row.get("train/ppl")),
            fmt.rate(row.get("train/lr")),
            fmt.norm(row.get("train/grad_norm")),
            fmt.speed(row.get("perf/tokens_per_second")),
            fmt.memory(row.get("perf/memory_mb")),
            fmt.memory(row.get("mem/host_added_peak_mb")),
            fmt.duration(eta),
        )
        self._put(Text(_aligned(cells)))

    def validation(self, row: Row, best: bool, saved: str | None = None) -> None:
        """One validation, and a line for each source; `best`: the lowest so far; `saved`: what was written, e.g. 'step_000050 (0.2 s)'."""
        cells = ("val", fmt.count(row["progress/tokens"]), fmt.loss(row["val/loss"]), fmt.perplexity(row["val/ppl"]))
        mark, checkpoint = "↓ best" if best else "", f"saved {saved}" if saved else ""
        line = f"{_aligned(cells)}  {fmt.loss(row['val/bits_per_byte'])} bits/byte {mark:6}  {checkpoint}".rstrip()
        self._put(Text(line, "bold green" if best else "bold"))
        for name in [match[1] for match in map(VAL_OF_SOURCE.fullmatch, row) if match]:
            loss, bits = (fmt.loss(row[f"val/{name}/{figure}"]) for figure in ("loss", "bits_per_byte"))
            self._put(Text(f"{_aligned(('', '', loss, fmt.perplexity(row[f'val/{name}/ppl'])))}  {bits} bits/byte of {name}", "dim"))

    def evaluation(self, row: Row, figures: Sequence[Figure]) -> None:
        """The tasks with one figure each: 'eval     102 k  agreement accuracy 0.612 · wikitext word_perplexity 81.2'."""
        results = " · ".join(f"{fmt.one_line(task)} {fmt.one_line(metric)} {fmt.figure(value)}" for task, metric, value in figures)
        self._put(Text(f"{_aligned(('eval', fmt.count(row['progress/tokens'])))}  {results}", "bold"))

    def saved(self, name: str, seconds: float) -> None:
        """A checkpoint that was saved during training."""
        self._put(Text(f"{'saved':>{WIDTHS['step']}}  {printable(name)} ({seconds:.1f} s)", "dim"))

    def done(
        self,
        steps: int,
        planned: int,
        seconds: float,
        best: tuple[float, int] | None,
        skipped: int = 0,
        picture: str | None = None,
        memory: Row | None = None,
    ) -> None:
        """The end: '300 steps in 2:57 · best 2.021 bits/byte at step 300 · 0 skipped · 9 MB of memory, 8 MB added by the run · loss.png'.

        `best` is (bits per byte, step); `memory` has the keys of metrics.jsonl. If the run ended before `planned` steps, the line says so.
        """
        label, parts = "done", [f"{steps} {'step' if steps == 1 else 'steps'} in {fmt.duration(seconds)}"]
        if steps < planned:
            label, parts = "ended", [f"after {steps} of {planned} steps, {fmt.duration(seconds)}"]
        if best:
            parts.append(f"best {fmt.loss(best[0])} bits/byte at step {best[1]}")
        parts.append(f"{skipped} skipped")
        if memory:
            parts.append(
                f"{fmt.memory(memory['perf/memory_mb'])} of memory, {fmt.memory(memory['mem/host_added_peak_mb'])} added by the run"
            )
        parts += [picture] if picture else []
        self._labelled(label, " · ".join(parts), CLOSING_INDENT, "bold green")

    def lines(self, lines: Iterable[str]) -> None:
        """Lines that are aligned already, such as the tables of recorded steps."""
        for line in lines:
            self._put(Text(line))

    def sample(self, prompt: str, text: str) -> None:
        """What the model writes after `prompt`, on one line."""
        self._labelled("sample", f"{fmt.one_line(prompt)} ▸ {fmt.one_line(text)}", CLOSING_INDENT, "cyan")

    def next(self, commands: Sequence[str], first: str | None = None) -> None:
        """Commands to type next, each on one line, so that it can be copied; `first`: one that the others need, once in a terminal."""
        labels = ["first"] * bool(first) + ["next"] + [""] * (len(commands) - 1)
        for label, command in zip(labels, [*filter(None, [first]), *commands], strict=True):
            self._put(Text.assemble((f"{label:<{CLOSING_INDENT}}", "cyan"), printable(command)))

    def warn(self, text: str, in_header: bool = False) -> None:
        """A warning: the run goes on. `in_header`: aligned with the lines of the header."""
        self._labelled("warn", fmt.one_line(text), HEADER_INDENT if in_header else CLOSING_INDENT, "bold yellow")

    @contextmanager
    def progress(self, label: str, total: int | None = None, unit: str = "", announced: bool = True) -> Iterator[Advance]:
        """Around slow work: a bar that is removed at the end, or in a pipe a plain line at the beginning and one every half minute.

        Yields `advance(n)`; `total` None: unknown. `unit`: what is counted; with a total, the rate and the time left are shown as well.
        `announced` False: in a pipe nothing is said of work that takes less than half a minute.
        """
        if self._console.quiet:
            yield nothing
            return
        label = printable(label)
        if not self._console.is_terminal:
            if announced:
                self._put(Text(f"{label} …"))
            with _progress_lines(lambda line: self._put(Text(line)), label, total, unit) as advance:
                yield advance
            return
        counts = _AmountColumn(unit) if unit else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn())
        with Progress(*(columns if total else columns[:2]), console=self._console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield functools.partial(bar.advance, task)

    def _labelled(self, label: str, text: str, indent: int, style: str) -> None:
        """`label  text`; a terminal gets long text as an indented block."""
        label, text = printable(label), printable(text)
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


class _AmountColumn(ProgressColumn):
    """'1.20 B of 2.00 B bytes · 3.10 M/s'."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        """The amount that is done, and the rate as soon as there is one."""
        return Text(_amount(task.completed, task.total or 0, self.unit, task.finished_speed or task.speed))


def _amount(done: float, total: float, unit: str, rate: float | None) -> str:
    return f"{fmt.count(done)} of {fmt.count(total)} {unit}" + (f" · {fmt.count(rate)}/s" if rate else "")


@contextmanager
def _progress_lines(put: Callable[[str], None], label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Calls `put` every PIPE_SECONDS with how far the work is: 'tokenizing a.txt … 41.0 M characters · 1:30'. Yields `advance(n)`.

    With a total and a unit: 'tokenizing … 41.0 M of 99.0 M bytes · 456 k/s · 1:30, 2:07 left'.

    A thread does it: some work, such as the training of a tokenizer, does not say how far it is.
    """
    began, over, done = time.monotonic(), threading.Event(), 0

    def advance(n: int = 1, /) -> None:
        nonlocal done
        done += n

    def report() -> None:
        while not over.wait(PIPE_SECONDS):
            seconds = time.monotonic() - began
            counted, left = f"{done:,} of {total:,} · " if total else f"{fmt.count(done)} {unit} · " if unit and done else "", ""
            if total and unit:
                counted = f"{_amount(done, total, unit, done / seconds)} · "
                left = f", {fmt.duration(seconds * (total - done) / done)} left" if done else ""
            put(f"{label} … {counted}{fmt.duration(seconds)}{left}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()


def _aligned(cells: Iterable[str]) -> str:
    """The cells right-aligned in the table's columns; one that is too wide for its column keeps one space before it."""
    line = ""
    for cell, width in zip(cells, WIDTHS.values(), strict=False):
        line += f"{cell:>{width}}" if len(cell) < width or not line else f" {cell}"
    return line
