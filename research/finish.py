"""The end of a run: its last checkpoint, the loss curve, what the model writes, what to type next."""

import shlex
from typing import TYPE_CHECKING

from parallel.errors import Mistake
from research import closing_sample, describe, plot, samples, saving
from research.samples import first_words
from research.start import short

if TYPE_CHECKING:
    from research.train import Run


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
    prompt = first_words(run.corpus)
    try:
        written = closing_sample.write(run.folder, run.job.experiment, run.corpus.tokenizer, prompt)
    except Mistake as mistake:
        run.voice.warn(f"no sample: {mistake}")
        return
    run.voice.sample(prompt, written.text)
    run.tracker.samples([samples.row(run.progress(), prompt, written.text, written.finish)])


def last_words(run: "Run") -> None:
    """What to type next."""
    here, prompt = short(run.folder), shlex.quote(first_words(run.corpus))
    dashboard = [f"wandb leet {here}/wandb"] if run.folder.wandb.is_dir() else []
    run.voice.next([f"python -m research generate {here} --prompt {prompt}", *dashboard, "python -m research runs"])
