"""Our training step beside transformers' GPT-2 of the same shape, on the same engine, in one process, interleaved.

    python benchmarks/train.py [--precision bf16] [--repetitions 7] [--steps 3] [--threads 2]

Prints CPU seconds a step (all threads) of both, the median of the repetitions, and the ratio theirs/ours: 1.0 is a draw, more
is in our favour. Both run forward, backward and the fused AdamW step of DeepSpeed's ZeRO-1 on the same micro-batches; theirs
computes the loss as transformers does (logits in fp32, F.cross_entropy). Repetitions alternate, so that a machine whose speed
drifts slows both.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from models import gpt
from models.config import GPT
from parallel import distributed
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import Engine, make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid, make_grid
from parallel.layers import Layer
from parallel.slices import Slice
from research.cli.verbs import count
from research.cluster.exit_codes import refusing

LAYERS, HIDDEN, HEADS, LENGTH, BATCH = 6, 384, 6, 256, 8
VOCABULARIES = (8_192, 50_304)


class Theirs(nn.Module):
    """transformers' GPT-2 as one layer of ours: ids -> logits. Its parameters are tagged as ours are, whole on the one rank."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        shape = GPT2Config(
            vocab_size=vocab_size,
            n_positions=LENGTH,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(shape)
        for name, parameter in self.named_parameters():
            parameter.logical_name, parameter.slice = name, Slice(tuple(parameter.shape))

    def forward(self, ids: Tensor) -> Tensor:
        """'b s' -> 'b s v'."""
        return self.model(ids).logits


def their_loss(logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    """Token mean as transformers' causal-LM loss computes it: in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels[0].flatten())


def ours(vocab_size: int, grid: Grid, settings: EngineSettings) -> Engine:
    """GPT-2's settings of our GPT on its engine."""
    shape = GPT(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        ffn_size=4 * HIDDEN,
        vocab_size=vocab_size,
        seq_length=LENGTH,
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        mlp="gelu_tanh",
        residual="pre_norm",
        init="gpt2",
        bias=True,
        qkv_bias=True,
        qk_norm=False,
        embedding_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
        attention_dropout=0.0,
        tied=True,
    )
    return make_engine(gpt.layers(shape, grid, seed=0), gpt.TokenLoss(vocab_size, 0.0, None), grid, settings)


def theirs(vocab_size: int, grid: Grid, settings: EngineSettings) -> Engine:
    """transformers' GPT-2 on the same engine."""
    return make_engine([Layer("gpt2", Theirs, {"vocab_size": vocab_size}, is_block=True)], their_loss, grid, settings)


def batch(vocab_size: int) -> MicroBatch:
    """One micro-batch of random tokens, all weighted alike."""
    tokens = torch.randint(0, vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return MicroBatch(tokens[:, :-1], (tokens[:, 1:], torch.full((BATCH, LENGTH), 1 / (BATCH * LENGTH))))


def cpu_seconds(step: Callable[[], object], steps: int) -> float:
    """CPU time of this process and its threads for one of `steps` steps."""
    before = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - before) / steps


def compare(vocab_size: int, precision: str, repetitions: int, steps: int) -> str:
    """One row: both medians and the ratio, with the spread of the pairwise ratios."""
    grid = make_grid(1, 1)
    settings = EngineSettings(precision, 1, BATCH, 1, clip=1.0, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pair = [make(vocab_size, grid, settings) for make in (ours, theirs)]
    data = batch(vocab_size)
    calls = [lambda engine=engine: engine.train_batch([data], 1e-4) for engine in pair]
    for call in calls:
        cpu_seconds(call, 2)  # memory is allocated and kernels are chosen here
    times = [[cpu_seconds(call, steps) for call in calls] for _ in range(repetitions)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(b / a for a, b in times)
    return f"{vocab_size:>8,}  {mine:9.3f} s  {other:9.3f} s  {statistics.median(ratios):6.3f}  ({ratios[0]:.3f} – {ratios[-1]:.3f})"


def main() -> None:
    """Parses the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=count, default=7)
    parser.add_argument("--steps", type=count, default=3, help="steps a repetition")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    distributed.start(0, 1, 0, None)
    print(f"{LAYERS} layers, hidden {HIDDEN}, T {LENGTH}, batch {BATCH}, {arguments.precision}, {arguments.threads} threads")
    print("CPU seconds a step, median of", arguments.repetitions)
    print("   vocab       ours   transformers   ratio  (range of the pairs)")
    for vocab_size in VOCABULARIES:
        print(compare(vocab_size, arguments.precision, arguments.repetitions, arguments.steps), flush=True)
    distributed.stop()


if __name__ == "__main__":
    with refusing():
        main()
