"""A run that is evaluated and sampled on the way trains as one that is not, bit for bit, on every layout and over a resume."""

import contextlib
import dataclasses
import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from models.inference.variant_check import UnusableLogits
from parallel.files import read_json
from research import __main__ as research_main
from research.tracking import metrics
from research.training.live_model import Live
from research.training.periodic import EVALUATION, Periodic
from tests.research.helpers import small_runs as r
from tests.research.helpers.example import example
from tests.research.helpers.small_runs import DROPS, Ended, Stage, bits

LAYOUTS = {  # name: ranks, settings of parallel
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipe": 2}),
    "DP2": (2, {}),
    "ZeRO-2, offload": (2, {"zero_stage": 2, "offload_optimizer": True}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "TP2·PP2": (4, {"tensor": 2, "pipe": 2}),
    "TP2·PP2·SP, full": (4, {"tensor": 2, "pipe": 2, "sequence": True, "recompute": "full"}),
}
SCIENCE: dict[str, Any] = {"optimizer": {"clip": 0.5, "warmup_steps": 4}, "schedule": {"validate_every": 3}}
PROMPTS = ("My fellow", "the people")
ASKED: dict[str, Any] = {
    "evaluate": {"every": 4, "tasks": ("validation", "agreement"), "limit": 12},
    "sample": {"every": 6, "prompts": PROMPTS, "tokens": 7},
}
EVERY = [(layout, precision, drops) for layout in LAYOUTS for precision in ("fp32", "bf16") for drops in (False, True)]
KEYS = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "val/bits_per_byte")


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, name: str, layout: str, precision: str = "fp32", drops: bool = False, **more) -> Ended:
    world, parallel = LAYOUTS[layout]
    model = {"seq_length": 40, **(DROPS if drops else {})}  # long enough for a sentence of the tasks
    settings = {**SCIENCE, "model": model, "parallel": parallel, "precision": precision, **more}
    return stage.run(name, world, **settings)


def samples(ended: Ended) -> list[dict]:
    return list(metrics.read(ended.folder.samples))


@pytest.mark.slow  # quick ones: test_resume.py without questions, test_live_model.py without a stop, and the signal below with both
@pytest.mark.parametrize(("layout", "precision", "drops"), EVERY)
def test_asked_stopped_and_resumed_is_never_asked_nor_stopped(stage: Stage, layout: str, precision: str, drops: bool) -> None:
    """Losses, norms, validations and the last checkpoint's weights and moments, to the bit; and the answers are one record."""
    name = f"{layout}_{precision}_{drops}"
    alone = go(stage, f"{name}_alone", layout, precision, drops)
    assert set(alone.codes) == {0}, alone.said
    asked = go(stage, f"{name}_asked", layout, precision, drops, **ASKED)
    assert set(asked.codes) == {0}, asked.said
    stopped = go(stage, name, layout, precision, drops, prelude=r.stopped_in_step_6, **ASKED)
    assert set(stopped.codes) == {138} and max(stopped.rows()) == 6 and samples(stopped) == []
    resumed = go(stage, name, layout, precision, drops, resume="auto", **ASKED)
    assert set(resumed.codes) == {0}, resumed.said
    for ended in (asked, resumed):
        assert all(ended.hexes(key) == alone.hexes(key) for key in KEYS)
        assert bits(ended.folder) == bits(alone.folder)
    answers = [key for key in {key for row in metrics.read(asked.folder.metrics) for key in row} if key.startswith("eval/")]
    assert len(answers) >= 6
    for key in answers:
        assert list(asked.rows(key)) == [4, 8, 12] and resumed.hexes(key) == asked.hexes(key), key
    assert [row["progress/step"] for row in samples(asked)] == [6, 6, 12, 12, 12]
    assert samples(resumed) == samples(asked)


GREEDY = {"temperature": 0.0, "top_p": 1.0}
DRAWN = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 4}
MANY = (*PROMPTS, "of", "war", "jobs")
"""More than pass a pipeline's micro-batch of two at once."""
SLOW_WRITERS = [("TP2·PP2", GREEDY, PROMPTS), ("1", GREEDY, PROMPTS), ("PP2", DRAWN, MANY)]
WRITERS = [("DP2", DRAWN, PROMPTS), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_WRITERS)]


@pytest.mark.parametrize(("layout", "choice", "prompts"), WRITERS)
def test_samples_are_what_generate_writes_from_the_same_step(stage: Stage, layout: str, choice: dict, prompts: tuple, capfd) -> None:
    asked = {"sample": {"every": 6, "prompts": prompts, "tokens": 9, **choice}, "checkpoints": {"every": 6}}
    ended = go(stage, f"writes_{layout}", layout, drops=True, **asked)
    folder, found = ended.folder, samples(ended)
    assert len(found) == 2 * len(prompts) + 1 and ended.said.count("\nsample ") == len(found)
    options = [word for name, value in choice.items() for word in (f"--{name}", str(value))]
    for step in (6, 12):
        rows = [row for row in found if row["progress/step"] == step][: len(prompts)]
        arguments = ["--checkpoint", str(step), "--max_new_tokens", "9", "--json", *options]
        assert research_main.main(["generate", str(folder.path), *(f"--prompt={prompt}" for prompt in prompts), *arguments]) == 0
        written = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert [(row["prompt"], row["text"], row["finish"]) for row in rows] == [(w["prompt"], w["text"], w["finish"]) for w in written]


@pytest.mark.slow
def test_without_prompts_the_held_out_text_is_continued_and_the_end_says_it_once(stage: Stage) -> None:
    ended = go(stage, "no_prompts", "1", sample={"every": 6, "tokens": 6}, evaluate={"every": 0, "tasks": ("agreement",)})
    found = samples(ended)
    assert [row["progress/step"] for row in found] == [6, 12] and len({row["prompt"] for row in found}) == 1
    assert "\n eval" not in ended.said


# What a signal does.


def signalled_in(pass_number: int, what: str, rank: int) -> None:
    """SIGUSR1 to rank 0 before the given pass of that kind."""
    from research.training import periodic

    goes_on, passes = periodic.goes_on, [0]

    def counted(run: Any, doing: str) -> bool:
        passes[0] += doing == what
        if rank == 0 and doing == what and passes[0] == pass_number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return goes_on(run, doing)

    periodic.goes_on = counted


def in_evaluation(rank: int) -> None:
    signalled_in(3, "evaluation", rank)


def in_samples(rank: int) -> None:
    signalled_in(2, "samples", rank)


SIGNALS = [(in_evaluation, ["evaluation", "samples"]), pytest.param(in_samples, ["samples"], marks=pytest.mark.slow)]
ALL_AT_SIX: dict[str, Any] = {"evaluate": ASKED["evaluate"] | {"every": 6}, "sample": ASKED["sample"]}


@pytest.mark.parametrize(("prelude", "due"), SIGNALS)
def test_a_signal_in_the_middle_leaves_no_half_row_and_the_resumed_run_begins_with_it(stage: Stage, prelude, due: list[str]) -> None:
    name = f"signal_{len(due)}"
    stopped = go(stage, name, "PP2", prelude=prelude, **ALL_AT_SIX)
    assert set(stopped.codes) == {138} and read_json(stopped.folder.run)["status"] == "interrupted"
    manifest = json.loads((stopped.folder.checkpoints / "step_000006" / "manifest.json").read_text())
    assert manifest["run"]["due"] == due and samples(stopped) == []
    assert list(stopped.rows("eval/validation/loss")) == ([] if "evaluation" in due else [6])
    resumed = go(stage, name, "PP2", resume="auto", **ALL_AT_SIX)
    assert set(resumed.codes) == {0}, resumed.said
    assert list(resumed.rows("eval/validation/loss")) == [6, 12]
    assert [row["progress/step"] for row in samples(resumed)] == [6, 6, 12, 12, 12]
    twice = [row["progress/step"] for row in metrics.read(resumed.folder.metrics) if "eval/validation/loss" in row or "val/loss" in row]
    assert sorted(twice) == [3, 6, 6, 9, 12, 12]


def killed_in_step_11(rank: int) -> None:
    r.before_step(rank, 11, lambda monitor: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
def test_after_a_kill_what_is_repeated_is_not_doubled(stage: Stage) -> None:
    settings: dict[str, Any] = {**ALL_AT_SIX, "checkpoints": {"every": 5}, "sample": ASKED["sample"] | {"every": 2}}
    go(stage, "killed", "1", prelude=killed_in_step_11, **settings)
    resumed = go(stage, "killed", "1", resume="auto", **settings)
    steps = [row["progress/step"] for row in samples(resumed)]
    assert steps == [step for step in (2, 4, 6, 8, 10, 12) for _ in PROMPTS] + [12]


@pytest.mark.slow
def test_what_is_asked_may_change_on_resume_and_what_is_due_with_it(stage: Stage) -> None:
    go(stage, "changed", "1", prelude=in_evaluation, **ALL_AT_SIX)
    resumed = go(stage, "changed", "1", resume="auto", sample={"every": 6, "prompts": ("of the",), "tokens": 5})
    assert resumed.codes == [0] and "evaluate.every 6 → 0" in resumed.said
    assert [row["prompt"] for row in samples(resumed)][:2] == ["of the", "of the"]
    assert resumed.rows("eval/validation/loss") == {}


@pytest.mark.parametrize(
    ("told", "due"),
    [
        ({"validation_due": True}, ["validation"]),
        ({"validation_due": False}, []),
        ({"due": ["samples", "validation"]}, ["validation", "samples"]),
        ({"due": ["what a later version does"]}, []),
    ],
)
def test_what_a_checkpoint_says_is_due(told: dict, due: list[str]) -> None:
    """The first two were written before there was anything but validations."""
    periodic = Periodic(SimpleNamespace(job=SimpleNamespace(experiment=example())), None, [], [])  # type: ignore[arg-type]
    periodic.restore({"best": [2.5, 3], **told})
    assert periodic.due == due and periodic.best == (2.5, 3)
    periodic.restore({"best": [2.5, 3], "validate_tokens": 100, **told})  # it was the best on other tokens
    assert periodic.due == due and periodic.best is None


@pytest.mark.parametrize(
    ("measure", "tasks", "unmeasured", "logged"),
    [
        (lambda step, model: {"step": step}, 1, [EVALUATION, "sample"], [{"measure/step": 4.0}]),
        (lambda step, model: {"step": step}, 0, ["sample"], [{"measure/step": 4.0}]),
        (lambda step, model: {"loss": model.log_probabilities([[1, 2]])[0][0]}, 1, [EVALUATION, "measurement", "sample"], []),
    ],
    ids=["of no logits", "no tasks", "of logits"],
)
def test_a_model_that_looks_ahead_is_measured_only_without_its_logits(
    measure: Any, tasks: int, unmeasured: list[str], logged: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is logged, a line says why, and training goes on."""

    def refuse(live: Live) -> None:
        raise UnusableLogits("token 1 of a text gets other logits")

    monkeypatch.setattr(Live, "refuse_dependent_logits", refuse)
    warned: list[str] = []
    rows: list[dict] = []
    asked = ASKED | {"evaluate": ASKED["evaluate"] | {"measure": "variant:own"}}
    run: Any = SimpleNamespace(
        job=SimpleNamespace(experiment=example(**asked)), engine=None, step=4, corpus=SimpleNamespace(tokenizer=None), axes=dict,
        console=SimpleNamespace(warn=warned.append, evaluation=lambda row, shown: None), variants={"own": measure},
        meter=SimpleNamespace(paused=contextlib.nullcontext), tracker=SimpleNamespace(log=rows.append),
    )  # fmt: skip
    periodic = Periodic(run, None, [None] * tasks, PROMPTS)  # type: ignore[list-item]
    periodic.carry_out([EVALUATION, "samples"])
    assert warned == [f"no {what} after step 4: token 1 of a text gets other logits" for what in unmeasured]
    assert rows == logged and periodic.due == []


def other_task_data_on_rank_1(rank: int) -> None:
    from research.evaluation import in_training

    read = in_training.prepare_tasks
    if rank == 1:
        in_training.prepare_tasks = lambda *arguments: [dataclasses.replace(task, digest="0" * 64) for task in read(*arguments)]


@pytest.mark.slow
def test_ranks_that_were_given_other_task_files_do_not_begin(stage: Stage) -> None:
    ended = go(stage, "disagree", "DP2", prelude=other_task_data_on_rank_1, evaluate=ASKED["evaluate"])
    assert set(ended.codes) == {2} and "rank 1 on " in ended.said and "has the data of task 'validation' = SHA-256 0000" in ended.said


# What an evaluation finds.


@pytest.mark.slow
def test_the_validation_task_is_the_runs_own_validation(stage: Stage) -> None:
    """Another path to the same number: windows asked of a scorer, and the loss of the engine."""
    ended = go(stage, "both", "DP2", evaluate={"every": 3, "tasks": ("validation",)})
    own, task = ended.rows("val/bits_per_byte"), ended.rows("eval/validation/bits_per_byte")
    assert list(own) == list(task) == [3, 6, 9, 12]
    assert all(abs(task[step] - own[step]) <= 2e-6 * own[step] for step in own)


@pytest.mark.slow
def test_logits_that_are_not_finite_end_nothing_but_the_sample(stage: Stage) -> None:
    settings = {"watch": {"non_finite": "skip", "most_skips": 0}, "sample": {"every": 6, "tokens": 5}, "evaluate": ASKED["evaluate"]}
    ended = go(stage, "poisoned", "DP2", prelude=nan_weight_after_step_5, **settings)
    assert set(ended.codes) == {0}, ended.said
    assert "warn   no sample after step 6: the model's logits are not finite" in ended.said
    assert ended.rows("eval/validation/loss")[8] != ended.rows("eval/validation/loss")[8]


def nan_weight_after_step_5(rank: int) -> None:
    """The final norm's weight is NaN from step 6 on, on every rank."""

    def poison(monitor: Any) -> None:
        monitor.engine.parameters["final_norm.weight"].data.fill_(float("nan"))

    r.before_step(rank, 6, poison)
