"""The end of a run: its last checkpoint, the loss curve, what the model writes, what to type next."""

import shlex
from typing import TYPE_CHECKING

from parallel.errors import Mistake
from research import closing_sample, describe, plot, saving, text
from research.start import short

if TYPE_CHECKING:
    from research.train import Run

PROMPT_TOKENS = 8
"""The sample at the end continues so many tokens of the held-out text."""


def finish(run: "Run") -> None:
    """The last checkpoint and the loss curve. Collective up to the checkpoint; what follows is rank 0's."""
    seconds = saving.save_last(run)
    if run.engine.grid.rank > 0:
        return
    run.voice.header([("saved", f"{short(run.folder)}/checkpoints/{saving.name_of(run.step)} ({seconds:.1f} s)")])
    plot.loss_curve(run.folder.metrics, run.folder.loss_png, run.folder.title, describe.layout_line(run.job))
    schedule = run.job.experiment.schedule
    run.voice.done(run.step, schedule.steps, run.meter.seconds(), run.best, run.engine.skipped_steps, run.folder.loss_png.name)
    if not run.stop.signal:  # who was asked to end does not start anything new
        show_sample(run)


def show_sample(run: "Run") -> None:
    """What the model writes after the held-out text's first words. Rank 0 reads its own checkpoint, so that no other is needed."""
    words, axes = run.corpus.tokenizer, run.progress()
    prompt = first_words(run)
    try:
        written = closing_sample.write(run.folder, run.job.experiment, words, prompt)
    except Mistake as mistake:
        run.voice.warn(f"no sample: {mistake}")
        return
    run.voice.sample(prompt, written)
    run.tracker.sample(int(axes["progress/step"]), int(axes["progress/tokens"]), prompt, written)


def first_words(run: "Run") -> str:
    """The prompt: how the held-out text begins, on one line, so that it can be typed."""
    return text.one_line(run.corpus.tokenizer.decode(run.corpus.validation.tokens[:PROMPT_TOKENS].tolist()))


def last_words(run: "Run") -> None:
    """What to type next."""
    here, prompt = short(run.folder), shlex.quote(first_words(run))
    dashboard = [f"wandb leet {here}/wandb"] if run.folder.wandb.is_dir() else []
    run.voice.next([f"python -m research generate {here} --prompt {prompt}", *dashboard, "python -m research runs"])
