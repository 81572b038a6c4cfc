"""What a model writes when its training ends: a text chosen as `sample` says, by rank 0 alone, on the CPU beside the training state."""
# MERGED-DOC """The end of a run: its last checkpoint, the loss curve, what the model writes, what to type next."""

import os
import shlex
from pathlib import Path

import torch

from models.config import GPT
from parallel.checkpoint.folder import latest, name_of
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from parallel.grid import Grid
from research.config import Experiment
from research.data.tokenizer import Tokenizer
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.restore import DecoderSpec, decoder_of
from research.generation.settings import GenerationSettings, text_seed
from research.tracking import plot
from research.tracking.run_folder import RunFolder
from research.training import samples
from research.training.checkpointer import Checkpointer
from research.training.job import layout_line
from research.training.samples import first_words
from research.training.state import Run

TOKENS = 40
ROOM = 4
"""The model is restored where so many times its fp32 weights are free."""


def write(folder: RunFolder, experiment: Experiment, tokenizer: Tokenizer, prompt: str, tokens: int = TOKENS) -> GeneratedText:
    """At most `tokens` tokens after the prompt, as many as the context has room for. A Mistake where it cannot be.

    Read from the newest checkpoint, whatever layout wrote it, so that no other rank is needed. `generate` writes the same on a CPU.
    """
    checkpoint = latest(folder.checkpoints)
    _refuse_little_memory(checkpoint)
    model = GPT(**experiment.model.model_dump())
    room = model.seq_length - len(tokenizer.prompt(prompt))
    plan = DecoderSpec(folder.path, checkpoint, context=model.seq_length)
    writer = TextGenerator(decoder_of(plan, Grid(), torch.device("cpu")), tokenizer, model, model.seq_length)
    seed = text_seed(experiment.sample.seed, 0, 0)
    text = writer.submit(prompt, GenerationSettings(max(1, min(tokens, room)), samples.sampling_params_of(experiment), seed))
    while writer:
        writer.step()
    return text


def _refuse_little_memory(checkpoint: Path) -> None:
    with Reader(checkpoint) as reader:
        weights = sum(4 * tensor.numel for tensor in reader.tensors.values())
    if ROOM * weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise Mistake("the whole model is large for this machine's free memory → `python -m research generate` on another")


def finish(run: Run, checkpointer: Checkpointer) -> None:
    """The last checkpoint and the loss curve. Collective up to the checkpoint; what follows is rank 0's."""
    seconds = checkpointer.save_last()
    if run.engine.grid.rank > 0:
        return
    run.console.header([("saved", f"{run.folder.shown}/checkpoints/{name_of(run.step)} ({seconds:.1f} s)")])
    plot.loss_curve(run.folder.metrics, run.folder.loss_png, run.folder.title, layout_line(run.job.experiment, run.job.layout))
    schedule, best = run.job.experiment.schedule, checkpointer.periodic.best
    run.console.done(run.step, schedule.steps, run.meter.seconds(), best, run.engine.skipped_steps, run.folder.loss_png.name)
    if not run.stop.signal:  # who was asked to end does not start anything new
        show_sample(run)


def show_sample(run: Run) -> None:
    """What the model writes after the held-out text's first words. Rank 0 reads its own checkpoint, so that no other is needed."""
    prompt = first_words(run.corpus)
    try:
        written = write(run.folder, run.job.experiment, run.corpus.tokenizer, prompt)
    except Mistake as mistake:
        run.console.warn(f"no sample: {mistake}")
        return
    run.console.sample(prompt, written.text)
    run.tracker.samples([samples.row(run.axes(), prompt, written.text, written.finish)])


def show_next_commands(run: Run) -> None:
    """What to type next."""
    folder, prompt = run.folder.shown, shlex.quote(first_words(run.corpus))
    dashboard = [f"wandb leet {folder}/wandb"] if run.folder.wandb.is_dir() else []
    run.console.next([f"python -m research generate {folder} --prompt {prompt}", *dashboard, "python -m research runs"])
