"""Our greedy generation beside transformers' `generate`: the same GPT-2, the same prompts, in one process, interleaved.

    python benchmarks/generate.py [--precision bf16] [--batch 1] [--vocab 8192] [--repetitions 9] [--tokens 128] [--threads 1]

Prints tokens a CPU second (all threads) of ours, of theirs with its dynamic and with its static cache, the median of the
repetitions, and the ratio of ours to the faster of theirs, pair by pair: 1.0 is a draw, more is in our favour. All three read the
prompts and write the same number of tokens; the share of equal ones is printed, and in fp32 must be all. Repetitions alternate, so that a
machine whose speed drifts slows all three.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models import gpt
from models.conversion import mapping, read_config
from models.inference.decoder import Decoder
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research.cli.verbs import count
from research.cluster.exit_codes import refusing
from research.generation.batching import BatchScheduler, Request

LAYERS, HIDDEN, HEADS, LENGTH = 6, 384, 6, 512
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Write = Callable[[], list[list[int]]]
"""Reads the prompts, returns what was written after each."""


def their_model(vocab_size: int, dtype: torch.dtype) -> GPT2LMHeadModel:
    """transformers' GPT-2, no token of which ends a text. Weights are wide enough that no two logits are nearly equal."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=LENGTH,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def ours(model: GPT2LMHeadModel, prompts: list[list[int]], tokens: int) -> Write:
    """Their weights in our GPT, written by the batch loop that the command and a server use."""
    shape = read_config.settings(model.config)
    module = PlainModule(gpt.layers(shape, Grid(), seed=0))
    weights = mapping.from_hf(shape, "gpt2", model.state_dict())
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            parameter.copy_(weights[name])
    decoder = Decoder(module.to(model.dtype), shape, Grid(), len(prompts), LENGTH)

    def write() -> list[list[int]]:
        batch = BatchScheduler(decoder, shape.vocab_size)
        written = [batch.submit(Request(tuple(prompt), tokens)) for prompt in prompts]
        while batch:
            batch.step()
        return [each.ids for each in written]

    return write


def theirs(model: GPT2LMHeadModel, prompts: list[list[int]], tokens: int, cache: str) -> Write:
    """`generate` with the `dynamic` or the `static` cache."""
    ids = torch.tensor(prompts)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, cache_implementation=cache)
    return lambda: model.generate(ids, **settings)[:, ids.shape[1] :].tolist()


def speed(write: Write) -> tuple[float, list[list[int]]]:
    """Tokens a CPU second of this process and its threads, and the tokens."""
    before = time.process_time()
    written = write()
    return sum(map(len, written)) / (time.process_time() - before), written


def compare(arguments: argparse.Namespace, vocab_size: int, precision: str, batch: int) -> str:
    """One row: the medians, the median of the pairs' ratios and their range, the share of equal tokens."""
    torch.manual_seed(0)
    model = their_model(vocab_size, PRECISIONS[precision])
    prompts = torch.randint(0, vocab_size, (batch, arguments.prompt)).tolist()
    writers = [ours(model, prompts, arguments.tokens), *(theirs(model, prompts, arguments.tokens, c) for c in ("dynamic", "static"))]
    texts = [speed(write)[1] for write in writers]  # memory is allocated and kernels are chosen here
    pairs = list(zip(sum(texts[0], []), sum(texts[1], []), strict=True))
    equal = sum(a == b for a, b in pairs) / len(pairs)
    if precision == "fp32" and equal < 1:
        raise SystemExit(f"only {equal:.1%} of the tokens are transformers' own")
    speeds = [[speed(write)[0] for write in writers] for _ in range(arguments.repetitions)]
    mine, dynamic, static = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratios = sorted(a / max(b, c) for a, b, c in speeds)
    middle = statistics.median(ratios)
    numbers = f"{mine:8.1f} {dynamic:9.1f} {static:8.1f} {middle:7.2f}  ({ratios[0]:.2f} – {ratios[-1]:.2f})"
    return f"{vocab_size:>7,} {precision:>9} {batch:>6} {numbers}   {equal:.0%}"


def main() -> None:
    """Parses the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=list(PRECISIONS), help="both, unless one is named")
    parser.add_argument("--batch", type=count, help="prompts at once; 1 and 8, unless a number is given")
    parser.add_argument("--vocab", type=count, default=8_192)
    parser.add_argument("--prompt", type=count, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=count, default=128, help="tokens to write after each")
    parser.add_argument("--repetitions", type=count, default=9)
    parser.add_argument("--threads", type=count, default=1)
    arguments = parser.parse_args()
    if arguments.prompt + arguments.tokens > LENGTH:
        raise Mistake(f"--prompt {arguments.prompt} and --tokens {arguments.tokens} are more than {LENGTH} together → use fewer")
    torch.set_num_threads(arguments.threads)
    sizes = f"{LAYERS} layers, hidden {HIDDEN}, {arguments.prompt} + {arguments.tokens} tokens"
    print(f"{sizes}, {arguments.threads} threads, torch {torch.__version__}")
    print("tokens a CPU second, median of", arguments.repetitions)
    print("  vocab precision  batch     ours   dynamic   static   ratio  (range of the pairs)   equal")
    for precision in [arguments.precision] if arguments.precision else PRECISIONS:
        for batch in [arguments.batch] if arguments.batch else (1, 8):
            print(compare(arguments, arguments.vocab, precision, batch), flush=True)


if __name__ == "__main__":
    with refusing():
        main()
