"""`compare --windows`: the noise of the held-out text, from the windows that the checkpoints of all runs score. Torch is imported late."""

import argparse
import sys
from dataclasses import replace

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake
from research import ROOT
from research.ablation.comparison import FINAL, Comparison
from research.ablation.sides import FinishedRun
from research.cli.evaluate import TOKENS_AT_ONCE
from research.cli.trained_run import say, settings_of_run
from research.config.abilities import gpt_of
from research.data.run_tokenizer import load_tokenizer
from research.evaluation import window_scores
from research.evaluation.perplexity import Perplexity
from research.evaluation.registry import VALIDATION
from research.evaluation.task import Settings, TaskContext
from research.evaluation.window_scores import WindowScores
from research.tracking.console import Console

METRICS = ("val/loss", "val/bits_per_byte")


def with_text_noise(comparison: Comparison, arguments: argparse.Namespace) -> Comparison:
    """The comparison with `text_stderr` of each variant. `arguments`: `trust`."""
    question = comparison.question
    if question.metric not in METRICS:
        raise Mistake(f"--windows is about the held-out text, and {question.metric} is not → use --metric {' or '.join(METRICS)}")
    if question.value != FINAL or comparison.cut:
        raise Mistake("--windows scores the checkpoints of the ends of the runs, and other values are compared → leave it out")
    scores: dict[str, WindowScores] = {}
    for side in comparison.sides:
        for run in side.runs.values():
            scores[run.folder.title] = _scores(run, arguments)
    variants = []
    for variant in comparison.variants:
        sides = ([scores[side.runs[seed].folder.title] for seed in variant.seeds] for side in (comparison.baseline, variant.side))
        stderr = window_scores.stderr_of_difference(*sides)
        variants.append(replace(variant, text_stderr=stderr and stderr * _unit(comparison.baseline.first, question.metric)))
    return replace(comparison, variants=tuple(variants))


def _scores(run: FinishedRun, arguments: argparse.Namespace) -> WindowScores:
    """Of the run's last checkpoint, on the part of the held-out text that it validates on."""
    experiment = settings_of_run(arguments, run.folder, [VALIDATION])
    checkpoint = checkpoint_folder.latest(run.folder.checkpoints)
    model, predicted = gpt_of("compare --windows", experiment.model, run.folder.title), experiment.schedule.validate_tokens
    settings = Settings(limit=max(2, predicted // model.seq_length) if predicted else None)
    tokenizer = load_tokenizer(experiment.data, ROOT, say)
    context = TaskContext(tokenizer, model.seq_length + 1, experiment.data, ROOT, say)
    windows = Perplexity(VALIDATION, settings).requests(context).requests

    from research.evaluation.session import Session

    console, batch = Console(sys.stderr), max(1, TOKENS_AT_ONCE // model.seq_length)
    with (
        Session(run.folder.path, checkpoint, model, tokenizer, None, 1, batch, console.warn) as session,
        console.progress(f"windows of {run.folder.title}", len(windows), announced=False) as advance,
    ):
        return window_scores.of_checkpoint(run.folder, checkpoint, model, windows, lambda: session.scorer, advance)


def _unit(run: FinishedRun, metric: str) -> float:
    """Units of the metric for one nat per token: of bits per byte, tokens / (bytes · ln 2)."""
    row = next(row for row in reversed(run.rows) if metric in row and "val/loss" in row)
    return row[metric] / row["val/loss"]
