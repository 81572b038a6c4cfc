"""`python -m research sample RUN`: one process reads a checkpoint, whatever layout wrote it, and continues a prompt."""

import os
import sys
from pathlib import Path

import torch

from models import gpt
from models.config import GPT
from parallel.checkpoint_folder import latest
from parallel.checkpoint_reader import Reader, load_weights
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule
from research import config, run_folder
from research.config import Experiment
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.experiment import load_variants
from research.run_folder import RunFolder
from research.text import one_line
from research.verbs import Parser

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    """Prints the prompt and its most likely continuation, token by token."""
    parser = Parser("sample", "Continue a prompt with the most likely token, again and again (greedy), on this machine in one process.")
    parser.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens to write at most (default: 64)")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 1:
        raise Mistake(f"--tokens {arguments.tokens} is not a number of tokens → use 1 or more")
    folder = run_folder.find(arguments.run)
    experiment = config.load(folder.config)
    tokenizer = load_tokenizer(experiment.data, ROOT)
    sys.stdout.write(arguments.prompt)
    module = restored(folder, experiment)
    for piece in continuation(module, tokenizer, arguments.prompt, arguments.tokens, experiment.model.seq_length):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def restored(folder: RunFolder, experiment: Experiment) -> PlainModule:
    """The run's newest checkpoint as a plain fp32 module, in evaluation mode. Variants come from the run's own copy."""
    model = GPT(**experiment.model.model_dump())
    module = PlainModule(gpt.layers(model, Grid(), experiment.seed, load_variants(folder.source, experiment.model)))
    with Reader(latest(folder.checkpoints)) as reader:
        load_weights(module, reader, Grid())
    return module.eval()


def continuation(module: PlainModule, tokenizer: Tokenizer, prompt: str, tokens: int, seq_length: int):
    """Yields the text of at most `tokens` further tokens as it becomes certain; stops at end-of-text.

    The model sees at most its last seq_length tokens. Text is given out as whole characters: a token may end inside one.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    given, start = "", len(ids)
    for _ in range(tokens):
        following = most_likely(module, ids[-seq_length:], tokenizer.vocab_size)
        if following == tokenizer.end_of_text:
            break
        ids.append(following)
        text = tokenizer.decode(ids[start:])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(given) :]
            given = text


@torch.no_grad()
def most_likely(module: PlainModule, ids: list[int], vocab_size: int) -> int:
    """The id with the highest logit after `ids`, among those the tokenizer has."""
    logits = module(torch.tensor([ids]))[0, -1, :vocab_size]
    return int(logits.argmax())


def write_after_training(folder: RunFolder, experiment: Experiment, tokenizer: Tokenizer, prompt: str, tokens: int = 40) -> str | None:
    """A greedy sample of the run just ended, on one line; None where the fp32 weights would not fit easily into free memory."""
    with Reader(latest(folder.checkpoints)) as reader:
        needed = sum(4 * tensor.numel for tensor in reader.tensors.values())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * needed > free:
        return None
    pieces = continuation(restored(folder, experiment), tokenizer, prompt, tokens, experiment.model.seq_length)
    return one_line("".join(pieces))
