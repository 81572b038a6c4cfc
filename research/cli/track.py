"""`python -m research track RUN …`: writes complete Weights & Biases runs from the run folders' files. Imports no torch."""

import argparse
import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from parallel.errors import Mistake
from research.cli.verbs import Parser
from research.tracking import run_folder, run_record, run_status, wandb_artifacts, wandb_client, wandb_record
from research.tracking.console import Console
from research.tracking.format import plural, short_path
from research.tracking.run_folder import FINISHED, IMPORTED, RUNNING, RunFolder

WHAT = """Writes a run to Weights & Biases (W&B) from its own files: settings, every row of metrics.jsonl, samples, the loss curve, the
results of `evaluate`, and references to its checkpoints. A run does this itself while it trains; use this verb if it had W&B disabled,
or if W&B failed or started too late. Weights that another program has trained have no rows: the results of `evaluate` become a W&B run of
the job type eval. If W&B has everything already, nothing is written."""
ADVICE = """The W&B run is written to RUN/wandb, where `wandb leet RUN/wandb` shows it, and online also to W&B's server. An
incomplete offline record is replaced."""
PURPOSE = "python -m research track"
EVALUATION = "eval"
"""W&B's job type of a run that was only evaluated; that of training is `track.job_type`."""
FINISH_SECONDS = 600.0
"""How long the upload of a whole run may take."""


def main(argv: list[str]) -> None:
    """Writes each run that W&B does not have completely, and says what to do with it."""
    parser = Parser("track", WHAT)
    parser.epilog = ADVICE
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        help="where to write it: auto means what WANDB_MODE says, or online with a key and a server that answers, else offline "
        "(default: the run's track.mode, or auto if that is disabled)",
    )
    arguments: argparse.Namespace = parser.parse_args(argv)
    console = Console()
    for folder in [run_folder.find(run) for run in arguments.runs]:
        track(folder, arguments.mode, console)


def track(folder: RunFolder, asked: str | None, console: Console) -> None:
    """Writes one run unless W&B has it. A Mistake for a run that has neither rows nor results, has rows still to come, or is in use."""
    from research.cli.evaluate import summary_rows
    from research.evaluation import results

    run_folder.refuse_link(folder.wandb)
    run = run_record.read(folder)
    status, rows = run_status.status(run, folder), len(wandb_record.rows(folder))
    figures = summary_rows(results.every(folder))
    if not rows and not figures:
        way_out = "track a run that has trained, or `evaluate` this one first"
        raise Mistake(f"{folder.title} ({status}) has no rows in {folder.metrics.name} and no results of evaluations → {way_out}")
    if status == RUNNING:
        raise Mistake(f"{folder.title} is running and tells W&B itself what it logs → track it when it has ended")
    with contextlib.closing(run_status.take_lock(folder, PURPOSE)):  # neither a resumed run nor another `track` writes RUN/wandb meanwhile
        _track(folder, asked, console, status, rows, figures)


def _track(folder: RunFolder, asked: str | None, console: Console, status: str, rows: int, figures: dict[str, float]) -> None:
    """Writes the run, whose lock is held."""
    known = wandb_record.known(folder, figures)
    counts = [plural(rows, "row")] * bool(rows) + [f"{plural(len(figures), 'result')} of evaluations"] * bool(figures)
    what = " and ".join(counts)
    if known.complete and (not known.missing_checkpoints or was_sent(folder, known)):  # a checkpoint alone is not sent a second time
        console.header([("", f"{folder.title} · W&B has all of it already: {what}"), *ways(folder, known.online)])
        return

    configured = wandb_client.describe(folder).config["track"]["mode"]
    mode = asked or ("auto" if configured == "disabled" else configured)
    twice = "rows of it may be on W&B's server already" if was_sent(folder, known) else ""
    if twice and asked == "online":
        way_out = "leave --mode online out: then it is written to RUN/wandb"
        raise Mistake(f"{folder.title}: {twice}, and would be there twice → {way_out}")
    old = [path.parent for path in known.files if path.parent.name.startswith("offline-")]
    opened = write(folder, "offline" if twice else mode, 0 if status in (FINISHED, IMPORTED) else 1, figures, old)
    why = twice if twice and mode != "offline" else opened.why
    where = f"online · {opened.run.url}" if opened.mode == "online" else f"{opened.mode} ({why})"
    instead = " · in place of an incomplete record" if old else ""
    console.header([("", f"{folder.title} · W&B {where} · {what}{instead}")])
    if opened.run is not None:
        console.header(ways(folder, opened.mode == "online"))


def was_sent(folder: RunFolder, known: wandb_record.Known) -> bool:
    """Whether W&B's server may have rows of the run: it was online, if only as wandb.json says, or `wandb sync` has left its mark."""
    synced = any(path.with_suffix(".wandb.synced").exists() for path in known.files)
    return known.online or synced or wandb_client.recorded(folder).get("mode") == "online"


def write(folder: RunFolder, mode: str, exit_code: int, figures: dict[str, float], old: list[Path]) -> wandb_client.Opened:
    """The new W&B run, in place of the offline ones in the folders `old`. One that has results but no rows is an evaluation."""
    description = wandb_client.describe(folder)
    if not wandb_record.rows(folder):
        description = replace(description, job_type=EVALUATION)
    try:
        with wandb_record.replacing(folder.wandb, old):
            checkpoints = [partial(wandb_artifacts.of_checkpoint, folder, path) for path in wandb_artifacts.checkpoints(folder)]
            return wandb_record.write(
                folder, description, mode, exit_code, figures=figures, finish_seconds=FINISH_SECONDS, references=checkpoints
            )
    except Exception as error:  # whatever W&B raises
        way_out = "check W&B's settings, or add --mode offline"
        raise Mistake(f"W&B could not write {folder.title} ({wandb_client.reason(error)}) → {way_out}") from error


def ways(folder: RunFolder, online: bool) -> list[tuple[str, str]]:
    """How to view the W&B run, and how to upload it."""
    place = short_path(folder.wandb)
    upload = [("upload", f"wandb sync {'--include-online ' if online else ''}{place}")]
    return [("view", f"wandb leet {place}"), *([] if online and wandb_client.recorded(folder).get("url") else upload)]
