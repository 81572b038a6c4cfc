"""What a model writes when its training ends: a text chosen as `sample` says, by rank 0 alone, on the CPU beside the training state."""

import os
from pathlib import Path

import torch

from models.config import GPT
from parallel.checkpoint_folder import latest
from parallel.checkpoint_reader import Reader
from parallel.errors import Mistake
from parallel.grid import Grid
from research import samples
from research.ask import Ask, text_seed
from research.config import Experiment
from research.data.tokenizer import Tokenizer
from research.restore import Plan, decoder_of
from research.run_folder import RunFolder
from research.writer import Text, Writer

TOKENS = 40
ROOM = 4
"""The model is restored where so many times its fp32 weights are free."""


def write(folder: RunFolder, experiment: Experiment, tokenizer: Tokenizer, prompt: str, tokens: int = TOKENS) -> Text:
    """At most `tokens` tokens after the prompt, as many as the context has room for. A Mistake where it cannot be.

    Read from the newest checkpoint, whatever layout wrote it, so that no other rank is needed. `generate` writes the same on a CPU.
    """
    checkpoint = latest(folder.checkpoints)
    _refuse_little_memory(checkpoint)
    model = GPT(**experiment.model.model_dump())
    room = model.seq_length - len(tokenizer.prompt(prompt))
    plan = Plan(folder.path, checkpoint, context=model.seq_length)
    writer = Writer(decoder_of(plan, Grid(), torch.device("cpu")), tokenizer, model, model.seq_length)
    seed = text_seed(experiment.sample.seed, 0, 0)
    text = writer.submit(prompt, Ask(max(1, min(tokens, room)), samples.choice_of(experiment), seed))
    while writer:
        writer.step()
    return text


def _refuse_little_memory(checkpoint: Path) -> None:
    with Reader(checkpoint) as reader:
        weights = sum(4 * tensor.numel for tensor in reader.tensors.values())
    if ROOM * weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise Mistake("the whole model is large for this machine's free memory → `python -m research generate` on another")
