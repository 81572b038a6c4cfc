"""The end of a run: its last checkpoint, the loss curve, a closing sample, and what to type next."""

import os
import shlex

import torch

from models.config import GPT
from models.encoder_config import T5
from parallel.checkpoint.folder import latest, name_of, newest_complete
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from parallel.grid import Grid
from research.cluster.environment import activate_command
from research.config import Experiment, Pairs
from research.config.abilities import ABILITIES
from research.data.tokenizer import Tokenizer
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.restore import DecoderSpec, model_of
from research.generation.settings import GenerationSettings, text_seed
from research.generation.sources import source_form
from research.tracking import plot, wandb_record
from research.tracking.run_folder import RunFolder
from research.training import samples
from research.training.checkpointer import Checkpointer
from research.training.job import layout_line
from research.training.samples import first_prompt
from research.training.state import Run

TOKENS = 40
ROOM = 4
"""The model is restored only if so many times the size of its fp32 weights is free."""


def finish(run: Run, checkpointer: Checkpointer) -> None:
    """Saves the last checkpoint, then draws the loss curve and shows a sample. Collective up to the checkpoint; the rest is rank 0's."""
    seconds = checkpointer.save_last()
    if run.engine.grid.rank > 0:
        return
    run.tracker.refer_to_checkpoints(every=1)
    run.console.header([("saved", f"{run.folder.shown}/checkpoints/{name_of(run.step)} ({seconds:.1f} s)")])
    layout = f"{layout_line(run.job.experiment, run.job.layout)} · {run.job.experiment.precision}"
    try:
        plot.loss_curve(run.folder.metrics, run.folder.loss_png, run.folder.title, layout)
    except OSError as error:  # the run is complete without its picture
        run.console.warn(f"{run.folder.loss_png} cannot be written ({error.strerror}) → `python -m research plot` draws it")
    schedule, best = run.job.experiment.schedule, checkpointer.periodic.best
    skipped, picture, memory = run.engine.skipped_steps, run.folder.loss_png.name, run.meter.memory_row()
    run.console.done(run.step, schedule.steps, run.meter.seconds(), best, skipped, picture, memory)
    experiment, ended = run.job.experiment, run.stop.signal or run.stop.trouble  # a run that was asked to end starts nothing new
    if (isinstance(experiment.model, GPT) or isinstance(experiment.data.examples, Pairs)) and not ended:
        show_sample(run)


def show_sample(run: Run) -> None:
    """Shows and logs what the model writes after the first words of the held-out text, or for its first source. Rank 0 only."""
    prompt = first_prompt(run.job.experiment, run.corpus)
    try:
        written = write(run.folder, run.job.experiment, run.corpus.tokenizer, prompt)
    except Mistake as mistake:
        run.console.warn(f"no sample: {mistake}")
        return
    run.console.sample(prompt, written.text)
    run.tracker.samples([samples.row(run.axes(), prompt, written.text, written.finish)])


def write(folder: RunFolder, experiment: Experiment, tokenizer: Tokenizer, prompt: str, tokens: int = TOKENS) -> GeneratedText:
    """At most `tokens` tokens after the prompt, as many as the context has room for, sampled as `sample` says.

    The model is read from the newest checkpoint, whatever layout wrote it, onto the CPU of this process beside the training state, so no
    other rank is needed. `generate` writes the same text on a CPU. Raises a Mistake if there is little memory.
    """
    checkpoint = latest(folder.checkpoints)
    with Reader(checkpoint) as reader:
        weights = sum(4 * tensor.numel for tensor in reader.tensors.values())
    if ROOM * weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise Mistake("the whole model is large for this machine's free memory → `python -m research generate` on another")

    model, source = model_of(folder.path), source_form(experiment, tokenizer)
    assert isinstance(model, GPT | T5)
    length = len(tokenizer.prompt(prompt) if source is None else source.ids(tokenizer, prompt))
    before = 0 if isinstance(model, T5) else length
    tokens = max(1, min(tokens, model.seq_length - before))
    spec = DecoderSpec(folder.path, checkpoint, context=min(before + tokens, model.seq_length), start=source.start if source else None)
    generator = TextGenerator(spec.on(Grid(), torch.device("cpu")), tokenizer, model, model.seq_length, source=source)
    settings = GenerationSettings(tokens, samples.sampling_params_of(experiment), text_seed(experiment.sample.seed, 0, 0))
    text = generator.submit(prompt, settings)
    while generator:
        generator.step()
    return text


def show_next_commands(run: Run) -> None:
    """Shows what to type next: only commands that have something to work on."""
    folder, prompt = run.folder.shown, shlex.quote(first_prompt(run.job.experiment, run.corpus))
    saved, tracked = newest_complete(run.folder.checkpoints), wandb_record.files_of(run.folder)
    writes = run.job.experiment.model.kind in ABILITIES["generate"]
    generate = [f"python -m research generate {folder} --prompt {prompt}"] if saved and writes else []
    dashboard = [f"wandb leet {folder}/wandb"] if tracked else []
    run.console.next([*generate, *dashboard, "python -m research runs"], first=activate_command())
