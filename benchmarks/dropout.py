"""Our stateless dropout beside torch's F.dropout: forward and backward of one activation, in one process, interleaved.

    python benchmarks/dropout.py [--precision bf16] [--p 0.1] [--repetitions 15] [--calls 20] [--threads 1]

Prints CPU seconds a call (all threads) of both, the median of the repetitions, and the ratio ours/theirs: 1.0 is a draw, less
is in our favour. Ours derives each mask from where its elements are; theirs draws it from a generator whose state a layout and
a recomputation would have to carry. Repetitions alternate, so that a machine whose speed drifts slows both.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dropout import Dropout
from parallel.grid import Grid
from research.cli.verbs import count
from research.cluster.exit_codes import refusing

BATCH, LENGTH, HIDDEN = 8, 256, 384
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pair(p: float, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Ours and theirs: x 'b s d' -> y -> x's gradient."""
    dropout, samples = Dropout("benchmark", p, 0, Grid()), torch.arange(BATCH)
    x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype).requires_grad_()
    gradient = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)

    def there_and_back(drop: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(drop(x), x, gradient)

    return [there_and_back(lambda x: dropout(x, samples)), there_and_back(lambda x: F.dropout(x, p, training=True))]


def cpu_seconds(call: Callable[[], object], calls: int) -> float:
    """CPU time of this process and its threads for one of `calls` calls."""
    before = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - before) / calls


def compare(precision: str, p: float, repetitions: int, calls: int) -> str:
    """One row: both medians and the median of the ratios, with their range."""
    both = pair(p, PRECISIONS[precision])
    for call in both:
        cpu_seconds(call, 3)  # memory is allocated here
    times = [[cpu_seconds(call, calls) for call in both] for _ in range(repetitions)]
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(a / b for a, b in times)
    return f"{precision:>9}  {ours:7.2f} ms  {theirs:7.2f} ms  {statistics.median(ratios):6.2f}  ({ratios[0]:.2f} – {ratios[-1]:.2f})"


def probability(text: str) -> float:
    """A number from 0 and below 1, as argparse's `type`."""
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 and below 1")
    return value


def main() -> None:
    """Parses the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default=None, choices=list(PRECISIONS), help="both, unless one is named")
    parser.add_argument("--p", type=probability, default=0.1, help="probability of being dropped")
    parser.add_argument("--repetitions", type=count, default=15)
    parser.add_argument("--calls", type=count, default=20, help="calls a repetition")
    parser.add_argument("--threads", type=count, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"x {BATCH} × {LENGTH} × {HIDDEN}, p = {arguments.p}, forward + backward, {arguments.threads} threads, torch {torch.__version__}")
    print("CPU milliseconds a call, median of", arguments.repetitions)
    print("precision        ours    F.dropout   ratio  (range of the pairs)")
    for precision in [arguments.precision] if arguments.precision else PRECISIONS:
        print(compare(precision, arguments.p, arguments.repetitions, arguments.calls), flush=True)


if __name__ == "__main__":
    with refusing():
        main()
