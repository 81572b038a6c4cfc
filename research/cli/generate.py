"""What `generate` writes: a text as it comes, texts one below the other, JSON lines, or a conversation."""
# MERGED-DOC """The command line of `generate`, and everything that can be refused before torch is imported."""
# MERGED-DOC """`python -m research generate RUN`: a trained model continues prompts, one as it writes, a file's in batches."""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake, listed
from research import ROOT
from research.cli.trained_run import Trained, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.cluster.exit_codes import show_mistake
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.generation import prompts
from research.generation.settings import USUAL_TOKENS, GenerationSettings, refuse_context, refuse_long, text_seed
from research.tracking.console import Console
from research.tracking.format import json_line, printable

if TYPE_CHECKING:
    from research.generation.generator import GeneratedText, TextGenerator

WHAT = """Lets a trained model continue prompts. By default it takes the likeliest token, again and again (greedy); with --temperature
it draws one. The same command gives the same text, whatever is written beside it and on any number of tensor ranks, up to rounding:
in fp32 that is to say always, in bf16 two tokens may be so close that it decides. Stops at end-of-text."""


@dataclass(frozen=True)
class Task(Trained):
    """A command that can be carried out."""

    tokenizer: Tokenizer
    choice: SamplingParams
    prompts: tuple[str, ...]
    """Empty in an interactive session."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its text may have together."""
        asked, trained = self.arguments.context, self.experiment.model.seq_length
        return trained if asked is None else asked

    def ask(self, prompt: str, number: int = 0, text: int = 0) -> GenerationSettings:
        """What is asked for text `text` of this prompt, the `number`-th. A Mistake where it does not fit into the context."""
        arguments, length = self.arguments, self.length(prompt)
        seed = text_seed(arguments.seed, number, text)
        usual = max(1, min(USUAL_TOKENS, self.context - length))
        tokens = usual if arguments.max_new_tokens is None else arguments.max_new_tokens
        ask = GenerationSettings(tokens, self.choice, seed, tuple(map(prompts.check, arguments.stop)), arguments.logprobs)
        refuse_long(length, tokens, self.context, self.experiment.model)
        return ask

    def length(self, prompt: str) -> int:
        """Its tokens, those in front of every prompt included."""
        return len(self.tokenizer.prompt(prompt))

    @property
    def at_once(self) -> int:
        """Rows that the cache needs."""
        arguments = self.arguments
        return arguments.beams if arguments.beams > 1 else min(arguments.batch, arguments.n * max(1, len(self.prompts)))

    @property
    def places(self) -> int:
        """Tokens that each row of the cache needs room for."""
        return max((self.length(prompt) + self.ask(prompt).max_new_tokens for prompt in self.prompts), default=self.context)


def parser() -> Parser:
    """All options, with words that teach."""
    found = Parser("generate", WHAT)
    found.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    found.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    source = found.add_argument_group("what to continue, one of")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    source.add_argument(
        "--file", help='a .jsonl file of {"prompt": "…"}, or any with a prompt a line; -: standard input; writes JSON lines'
    )
    source.add_argument("--interactive", action="store_true", help="asks for prompts until Ctrl-D; Ctrl-C ends a text")
    length = found.add_argument_group("how long")
    usual = f"{USUAL_TOKENS}, or what the context leaves"
    length.add_argument("--max_new_tokens", type=int, metavar="N", help=f"tokens at most (default: {usual})")
    length.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    length.add_argument("--context", type=int, metavar="N", help="room for prompt and text together, in tokens (default: model.seq_length)")
    choice = found.add_argument_group("how the next token is chosen, in this order")
    add = choice.add_argument
    add("--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1, tokens that were there before become less likely")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (default); 1: drawn by the model's probabilities")
    add("--top_k", type=int, default=0, metavar="K", help="drawn from the K likeliest (default: from all)")
    add("--top_p", type=float, default=1.0, metavar="P", help="drawn from the likeliest that have probability P together (default: 1)")
    add("--min_p", type=float, default=0.0, metavar="P", help="drawn from those at least P times as likely as the likeliest (default: 0)")
    add("--seed", type=int, default=0, help="another seed, other draws (default: 0)")
    add("--beams", type=int, default=1, metavar="B", help="the likeliest whole text that a search with B beams finds")
    add("--n", type=int, default=1, help="texts for each prompt (default: 1)")
    output = found.add_argument_group("what is written")
    output.add_argument("--logprobs", type=int, metavar="N", help="each token's log-probability beside those of the N likeliest")
    output.add_argument("--json", action="store_true", help="a JSON line a text: prompt, text, finish, prompt_tokens, ids, logprobs, score")
    machine = found.add_argument_group("how it is computed")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    machine.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    machine.add_argument("--batch", type=int, default=8, metavar="N", help="texts that are written at once (default: 8)")
    return found


def prepared(arguments: argparse.Namespace) -> Task:
    """The command, checked."""
    refuse_launcher("generate")
    _refuse_sources(arguments)
    choice = SamplingParams(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingParams)})
    _refuse_counts(arguments, choice)
    found = find(arguments)
    given = prompts.read(arguments.file) if arguments.file else map(prompts.check, arguments.prompt or ())
    tokenizer = load_tokenizer(found.experiment.data, ROOT, say)
    task = Task(**vars(found), tokenizer=tokenizer, choice=choice, prompts=tuple(given))
    refuse_context(task.context, found.experiment.model)
    for prompt in task.prompts or ("",):
        task.ask(prompt)
    return task


def _refuse_sources(arguments: argparse.Namespace) -> None:
    sources = {"--prompt": arguments.prompt, "--file": arguments.file, "--interactive": arguments.interactive}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        said = f"{listed(given, 'and')} are given" if given else "there is nothing to continue"
        raise Mistake(f"{said} → give one of --prompt TEXT, --file FILE and --interactive")
    if arguments.interactive and arguments.json:
        raise Mistake("--interactive does not go with --json → use --prompt TEXT --json, or --file -")


def _refuse_counts(arguments: argparse.Namespace, choice: SamplingParams) -> None:
    n, beams = arguments.n, arguments.beams
    for name in ("n", "beams", "batch"):
        if getattr(arguments, name) < 1:
            raise Mistake(f"--{name} {getattr(arguments, name)} does not work → use 1 or more")
    if beams == 1 and n > 1 and choice.greedy:
        raise Mistake(f"--n {n} greedy texts are all the same → add --temperature 1, or --beams {n}")
    if beams == 1:
        return
    others = {"--temperature": not choice.greedy, "--stop": arguments.stop, "--logprobs": arguments.logprobs is not None}
    for name in (name for name, given in others.items() if given):
        raise Mistake(f"{name} does not go with --beams {beams}, a search for the likeliest whole text → leave one of them out")
    if n > beams:
        raise Mistake(f"--n {n} is more than --beams {beams} find → use --beams {n}, or --n {beams}")


INVITATION = "▸ "


def write(task: Task, writer: "TextGenerator") -> None:
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


def finished(task: Task, writer: "TextGenerator", given: tuple[str, ...]) -> Iterator["GeneratedText"]:
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


def json_lines(task: Task, writer: "TextGenerator") -> None:
    """A line a text on standard output, a bar on standard error."""
    from research.generation.generator import row

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
    with Console(sys.stderr).progress(label, total) as advance:
        yield advance


def blocks(task: Task, writer: "TextGenerator", given: tuple[str, ...]) -> None:
    """Prompt and text, an empty line between two."""
    for i, text in enumerate(finished(task, writer, given)):
        _put(("\n" if i else "") + printable(text.prompt + text.text) + "\n" + probabilities(text, task))


def streamed(task: Task, writer: "TextGenerator", prompt: str, number: int = 0, enough: Callable[[], bool] = lambda: False) -> None:
    """The prompt, then its text as it becomes certain, until it ends or is `enough`."""
    text = writer.submit(prompt, task.ask(prompt, number))
    _put(printable(prompt))
    while text.finish is None:
        writer.step()
        _put(printable(text.fresh))
        if enough():
            writer.cancel(text)
    _put("\n" + probabilities(text, task))


def converse(task: Task, writer: "TextGenerator") -> None:
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


def probabilities(text: "GeneratedText", task: Task) -> str:
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


def main(argv: list[str]) -> None:
    """Prints the texts; JSON lines for a file."""
    task = prepared(parser().parse_args(argv))

    with ready(task) as writer:
        write(task, writer)


@contextlib.contextmanager
def ready(task: Task) -> Iterator["TextGenerator"]:
    """The model, restored, on as many tensor ranks as asked for."""
    from research.cluster.tensor_ranks import opened
    from research.data.tokenizer_file import ends_of
    from research.generation.generator import TextGenerator
    from research.generation.restore import DecoderSpec

    plan = DecoderSpec(task.folder.path, task.checkpoint, task.arguments.precision, task.at_once, task.places)
    with opened(plan, task.arguments.tensor) as decoder:
        yield TextGenerator(decoder, task.tokenizer, task.experiment.model, task.context, ends_of(task.tokenizer, ROOT))
