"""What `generate` writes: a text as it comes, texts one below the other, JSON lines, or a conversation."""

import contextlib
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator

from parallel.errors import Mistake
from research import prompts
from research.generate_task import Task
from research.report import Report
from research.text import json_line, printable
from research.verbs import show_mistake
from research.writer import Text, Writer, row

INVITATION = "▸ "


def write(task: Task, writer: Writer) -> None:
    """Carries out the command."""
    arguments = task.arguments
    if arguments.interactive:
        converse(task, writer)
    elif arguments.file or arguments.json:
        json_lines(task, writer)
    elif len(task.prompts) == arguments.n == arguments.beams == 1:
        streamed(task, writer, task.prompts[0])
    else:
        blocks(task, writer, task.prompts)


def finished(task: Task, writer: Writer, given: tuple[str, ...]) -> Iterator[Text]:
    """The texts of all prompts in order, `--n` of each, as each is done; several are written at once."""
    arguments = task.arguments
    if arguments.beams > 1:
        for prompt in given:
            yield from writer.search(prompt, task.ask(prompt), arguments.beams, arguments.n)
        return
    texts = deque(writer.submit(prompt, task.ask(prompt, k, i)) for k, prompt in enumerate(given) for i in range(arguments.n))
    while texts:
        while texts[0].finish is None:
            writer.step()
        yield texts.popleft()


def json_lines(task: Task, writer: Writer) -> None:
    """A line a text on standard output, a bar on standard error."""
    with bar(f"writing {len(task.prompts) * task.arguments.n} texts", len(task.prompts) * task.arguments.n) as advance:
        for text in finished(task, writer, task.prompts):
            _put(json_line(row(text, task.tokenizer)) + "\n")
            advance()


@contextlib.contextmanager
def bar(label: str, total: int) -> Iterator:
    """A progress bar, where standard error is a terminal: a pipe is told nothing."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    with Report(sys.stderr).progress(label, total) as advance:
        yield advance


def blocks(task: Task, writer: Writer, given: tuple[str, ...]) -> None:
    """Prompt and text, an empty line between two."""
    for i, text in enumerate(finished(task, writer, given)):
        _put(("\n" if i else "") + printable(text.prompt + text.text) + "\n" + probabilities(text, task))


def streamed(task: Task, writer: Writer, prompt: str, number: int = 0, enough: Callable[[], bool] = lambda: False) -> None:
    """The prompt, then its text as it becomes certain, until it ends or is `enough`."""
    text = writer.submit(prompt, task.ask(prompt, number))
    _put(printable(prompt))
    while text.finish is None:
        writer.step()
        _put(printable(text.fresh))
        if enough():
            writer.cancel(text)
    _put("\n" + probabilities(text, task))


def converse(task: Task, writer: Writer) -> None:
    """Prompts from standard input, a line each. What cannot be continued is said, and the next one asked for."""
    for number, line in enumerate(_asked()):
        try:
            prompt = prompts.check(line)
            if task.arguments.n > 1 or task.arguments.beams > 1:
                blocks(task, writer, (prompt,))
            else:
                with _ctrl_c() as pressed:
                    streamed(task, writer, prompt, number, pressed)
        except Mistake as mistake:
            show_mistake(mistake)


def _asked() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import is what gives input() a history
    while True:
        try:
            yield input(INVITATION)
        except EOFError:
            _put("\n")
            return


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C does nothing but make what is yielded true: in the middle of a token, tensor ranks would be left waiting."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def probabilities(text: Text, task: Task) -> str:
    """A line a token: log-probability, token, and the likeliest others; nothing where none were asked for."""
    if text.ask.logprobs is None:
        return ""
    lines = []
    for token, (own, top) in zip(text.written.ids, text.written.logprobs, strict=True):
        others = " · ".join(f"{_quoted(task, other)} {logprob:.3f}" for other, logprob in top)
        lines.append(f"{own:9.3f}  {_quoted(task, token):<16} {others}".rstrip())
    return "\n".join(lines) + "\n"


def _quoted(task: Task, token: int) -> str:
    return json_line(task.tokenizer.decode([token]))


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
