"""`python -m research generate RUN`: continues prompts with a trained model, and prints the texts as they are generated.

Parses the command line and checks it before torch is imported. Output: one streamed text, several texts one below the other,
JSON lines, or an interactive session.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.config import GPT
from models.encoder_config import T5
from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake, listed
from parallel.text import decoded_line, printable
from research import ROOT
from research.cli.json_output import print_json
from research.cli.trained_run import Trained, add_trust_option, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.cluster.exit_codes import show_mistake
from research.config.abilities import writer_of
from research.data.fill_in_middle import Sentinels
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.generation import infilling, prompts
from research.generation.settings import DEFAULT_TOKENS, GenerationSettings, refuse_context, refuse_long, text_seed
from research.generation.sources import SourceForm, source_form
from research.tracking.console import Console
from research.tracking.format import json_line
from research.tracking.streams import without_escaping

if TYPE_CHECKING:  # both import torch
    from research.generation.generator import GeneratedText, TextGenerator

WHAT = """Continues prompts with a trained model. A run that was trained on pairs reads a prompt as a source, and writes its target: a
translation, for example. By default it takes the likeliest token at each step (greedy); with --temperature it draws one. The same command
gives the same text, whatever is generated beside it and on any number of tensor ranks, up to rounding: always in fp32; in bf16, two tokens
may be so close that rounding decides between them. A text ends at end-of-text."""
INPUT_PROMPT = "▸ "


def main(argv: list[str]) -> None:
    """Prints the texts; JSON lines for a file."""
    task = prepared(parser().parse_args(argv))

    from research.cluster.tensor_ranks import opened
    from research.data.tokenizer_file import ends_of
    from research.generation.generator import TextGenerator
    from research.generation.restore import DecoderSpec

    start = None if task.source is None else task.source.start
    spec = DecoderSpec(task.folder.path, task.checkpoint, task.arguments.precision, task.slots, task.cache_length, start)
    with opened(spec, task.arguments.tensor) as decoder:
        if decoder.uncached:
            Console(sys.stderr).warn(decoder.uncached)
        generator = TextGenerator(decoder, task.tokenizer, task.model, task.context, ends_of(task.tokenizer, ROOT), task.source)
        write(task, generator)


# The command line, and the checks before torch is imported


@dataclass(frozen=True)
class Task(Trained):
    """A checked command."""

    model: GPT | T5
    tokenizer: Tokenizer
    sampling: SamplingParams
    prompts: tuple[str, ...]
    """Empty in an interactive session."""
    sentinels: Sentinels | None
    """Of --fim, whose prefix is the prompt."""
    source: SourceForm | None
    """Of a run that was trained on sources and targets: prompts are sources."""

    @property
    def context(self) -> int:
        """The maximum number of tokens of a prompt and its text together; of an encoder–decoder those of a text."""
        requested, trained = self.arguments.context, self.experiment.model.seq_length
        return trained if requested is None else requested

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens that the model continues, or reads as a source."""
        if self.source is not None:
            return self.source.ids(self.tokenizer, prompt)
        if self.sentinels is None:
            return self.tokenizer.prompt(prompt)
        prefix, suffix = self.tokenizer.encode_batch([prompt, self.arguments.fim[1]])
        return infilling.infilling_prompt(self.tokenizer, self.sentinels, prefix, suffix)

    def shown(self, prompt: str) -> str:
        """What is printed in front of a text: nothing with --fim or behind a source, because it does not only follow the prompt."""
        return prompt if self.sentinels is None and self.source is None else ""

    def settings(self, prompt: str, number: int = 0, text: int = 0) -> GenerationSettings:
        """The settings of text `text` of prompt number `number`. Raises a Mistake if it does not fit into the context."""
        arguments, length = self.arguments, len(self.ids(prompt))
        seed = text_seed(arguments.seed, number, text)
        room = self.context - (0 if isinstance(self.model, T5) else length)
        default = max(1, min(DEFAULT_TOKENS, room))
        tokens = default if arguments.max_new_tokens is None else arguments.max_new_tokens
        settings = GenerationSettings(tokens, self.sampling, seed, tuple(map(prompts.check, arguments.stop)), arguments.logprobs)
        refuse_long(length, tokens, self.context, self.model)
        return settings

    @property
    def slots(self) -> int:
        """The number of rows of the cache."""
        arguments = self.arguments
        return arguments.beams if arguments.beams > 1 else min(arguments.batch, arguments.n * max(1, len(self.prompts)))

    @property
    def cache_length(self) -> int:
        """The number of tokens in each row of the cache: the longest prompt and its text; in an interactive session the whole context."""
        before = (0 if isinstance(self.model, T5) else len(self.ids(prompt)) for prompt in self.prompts)
        lengths = [length + self.settings(prompt).max_new_tokens for length, prompt in zip(before, self.prompts, strict=True)]
        return max(lengths, default=self.context)


def parser() -> Parser:
    """The options of `generate`."""
    parser = Parser("generate", WHAT)
    parser.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    add_trust_option(parser)
    source = parser.add_argument_group("what to continue; one of these")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    source.add_argument(
        "--file", help='a .jsonl file of {"prompt": "…"}, or any file with one prompt per line; -: standard input; prints JSON lines'
    )
    source.add_argument(
        "--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="writes the middle between two texts, with a run that was trained so"
    )
    source.add_argument("--interactive", action="store_true", help="reads prompts until Ctrl-D; Ctrl-C ends a text")
    length = parser.add_argument_group("how long")
    default = f"{DEFAULT_TOKENS}, or what the context leaves"
    length.add_argument("--max_new_tokens", type=int, metavar="N", help=f"maximum number of tokens (default: {default})")
    length.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    length.add_argument("--context", type=int, metavar="N", help="room for prompt and text together, in tokens (default: model.seq_length)")
    add = parser.add_argument_group("how the next token is chosen, in this order").add_argument
    add("--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1, tokens that occurred before become less likely")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: take the likeliest token (default); 1: draw by the model's probabilities",
    )
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    add(
        "--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have probability P together (default: 1)"
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from the tokens at least P times as likely as the likeliest (default: 0)",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add("--beams", type=int, default=1, metavar="B", help="beam search with B beams for the likeliest whole text")
    add("--n", type=int, default=1, help="number of texts per prompt (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--logprobs", type=int, metavar="N", help="print each token's log-probability and those of the N likeliest tokens")
    output.add_argument(
        "--json", action="store_true", help="one JSON line per text: prompt, suffix, text, finish, prompt_tokens, ids, logprobs, score"
    )
    machine = parser.add_argument_group("how it is computed")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    machine.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    machine.add_argument("--batch", type=int, default=8, metavar="N", help="number of texts generated at once (default: 8)")
    return parser


def prepared(arguments: argparse.Namespace) -> Task:
    """The command, checked without torch."""
    refuse_launcher("generate")
    _check_sources(arguments)
    sampling = SamplingParams(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingParams)})
    _check_counts(arguments, sampling)
    trained = find(arguments)
    parts = [prompts.check(text) for text in arguments.fim or ()]
    texts = prompts.read(arguments.file) if arguments.file else map(prompts.check, parts[:1] or arguments.prompt or ())
    tokenizer = load_tokenizer(trained.experiment.data, ROOT, say)
    sentinels = None
    if arguments.fim:
        sentinels = infilling.refuse_untrained(infilling.trained_sentinels(trained.experiment, tokenizer), trained.folder.title)
    model = writer_of("generate", trained.experiment.model, trained.folder.title)
    task = Task(
        **vars(trained),
        model=model,
        tokenizer=tokenizer,
        sampling=sampling,
        prompts=tuple(texts),
        sentinels=sentinels,
        source=source_form(trained.experiment, tokenizer),
    )
    refuse_context(task.context, task.model)
    for prompt in task.prompts or ("",):
        task.settings(prompt)
    return task


def _check_sources(arguments: argparse.Namespace) -> None:
    """Exactly one of --prompt, --file, --fim and --interactive is needed."""
    sources = {"--prompt": arguments.prompt, "--file": arguments.file, "--fim": arguments.fim, "--interactive": arguments.interactive}
    used = [name for name, value in sources.items() if value]
    if len(used) != 1:
        problem = f"{listed(used, 'and')} are given" if used else "there is nothing to continue"
        raise Mistake(f"{problem} → give one of --prompt TEXT, --file FILE, --fim PREFIX SUFFIX and --interactive")
    if arguments.interactive and arguments.json:
        raise Mistake("--interactive does not go with --json → use --prompt TEXT --json, or --file -")


def _check_counts(arguments: argparse.Namespace, sampling: SamplingParams) -> None:
    """--n, --beams and --batch must be positive and go with the other options."""
    n, beams = arguments.n, arguments.beams
    for name in ("n", "beams", "batch"):
        if getattr(arguments, name) < 1:
            raise Mistake(f"--{name} {getattr(arguments, name)} does not work → use 1 or more")
    if beams == 1 and n > 1 and sampling.greedy:
        raise Mistake(f"--n {n} greedy texts are all the same → add --temperature 1, or --beams {n}")
    if beams == 1:
        return
    others = {
        "--temperature": not sampling.greedy,
        "--stop": arguments.stop,
        "--logprobs": arguments.logprobs is not None,
        "--fim": arguments.fim,
    }
    for name in (name for name, used in others.items() if used):
        raise Mistake(f"{name} does not go with --beams {beams}, a search for the likeliest whole text → leave one of them out")
    if n > beams:
        raise Mistake(f"--n {n} is more than --beams {beams} find → use --beams {n}, or --n {beams}")


# Output


def write(task: Task, generator: "TextGenerator") -> None:
    """Generates the texts and prints them in the form that the command asks for."""
    arguments = task.arguments
    if arguments.interactive:
        _converse(task, generator)
    elif arguments.file or arguments.json:
        _write_json_lines(task, generator)
    elif len(task.prompts) == arguments.n == arguments.beams == 1:
        _stream(task, generator, task.prompts[0])
    else:
        _write_blocks(task, generator, task.prompts)


def _generate(task: Task, generator: "TextGenerator", texts: tuple[str, ...]) -> Iterator["GeneratedText"]:
    """The texts of all prompts in order, `--n` of each, as each is finished; several are generated at once."""
    arguments = task.arguments
    if arguments.beams > 1:
        for prompt in texts:
            yield from generator.search(prompt, task.settings(prompt), arguments.beams, arguments.n)
        return
    queue = deque(_submit(task, generator, prompt, k, i) for k, prompt in enumerate(texts) for i in range(arguments.n))
    while queue:
        while queue[0].finish is None:
            generator.step()
        yield queue.popleft()


def _submit(task: Task, generator: "TextGenerator", prompt: str, number: int = 0, text: int = 0) -> "GeneratedText":
    """Queues text `text` of prompt number `number`."""
    ends = {*generator.ends, *(task.sentinels or ())}
    return generator.submit_ids(task.ids(prompt), task.settings(prompt, number, text), ends, prompt)


def _write_json_lines(task: Task, generator: "TextGenerator") -> None:
    """One JSON line per text on standard output, and how far it is on standard error: a bar, or in a pipe a line each half minute."""
    from research.generation.generator import as_json

    count = len(task.prompts) * task.arguments.n
    with Console(sys.stderr).progress(f"writing {count} texts", count, announced=False) as advance:
        for text in _generate(task, generator, task.prompts):
            print_json(as_json(text, task.tokenizer) | ({"suffix": task.arguments.fim[1]} if task.sentinels else {}))
            advance()


def _write_blocks(task: Task, generator: "TextGenerator", texts: tuple[str, ...]) -> None:
    """Each prompt with its text, separated by empty lines."""
    for i, text in enumerate(_generate(task, generator, texts)):
        _put(("\n" if i else "") + task.shown(text.prompt) + text.text + "\n" + _logprob_lines(text, task))


def _stream(task: Task, generator: "TextGenerator", prompt: str, number: int = 0, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Prints the prompt, then its text as it becomes certain, until it ends or `should_stop()`."""
    text = _submit(task, generator, prompt, number)
    _put(task.shown(prompt))
    while text.finish is None:
        generator.step()
        _put(text.fresh)
        if should_stop():
            generator.cancel(text)
    _put("\n" + _logprob_lines(text, task))


def _converse(task: Task, generator: "TextGenerator") -> None:
    """Continues prompts from standard input, one per line. A Mistake is shown, and the next prompt is read."""
    for number, line in enumerate(_input_lines()):
        try:
            prompt = prompts.check(line)
            if task.arguments.n > 1 or task.arguments.beams > 1:
                _write_blocks(task, generator, (prompt,))
            else:
                with _interrupt_as_flag() as interrupted:
                    _stream(task, generator, prompt, number, interrupted)
        except Mistake as mistake:
            show_mistake(mistake)


def _input_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        for number, raw in enumerate(sys.stdin.buffer, start=1):
            try:
                yield decoded_line(raw, number, "standard input")[1]
            except Mistake as mistake:
                show_mistake(mistake)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import is what gives input() a history
    while True:
        try:
            yield input(INPUT_PROMPT)
        except EOFError:
            _put("\n")
            return


@contextlib.contextmanager
def _interrupt_as_flag() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C set a flag that the yielded function returns: an exception in the middle of a token would leave tensor ranks waiting."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def _logprob_lines(text: "GeneratedText", task: Task) -> str:
    """One line per token: its log-probability, the token, the likeliest other tokens. Empty without --logprobs."""
    if text.settings.logprobs is None:
        return ""
    decode, lines = task.tokenizer.decode, []
    for token, (logprob, top) in zip(text.generation.ids, text.generation.logprobs, strict=True):
        others = " · ".join(f"{json_line(decode([other]))} {likelihood:.3f}" for other, likelihood in top)
        lines.append(f"{logprob:9.3f}  {json_line(decode([token])):<16} {others}".rstrip())
    return "\n".join(lines) + "\n"


def _put(text: str) -> None:
    """Writes to standard output: exactly, except that a terminal gets escapes of what would steer it."""
    stream = without_escaping(sys.stdout)
    stream.write(printable(text, most=None) if sys.stdout.isatty() else text)
    stream.flush()
