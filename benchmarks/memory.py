"""Resident memory of a training rank by step, with different settings of the C library's heap, each in a process of its own.

    python benchmarks/memory.py [--steps 2000] [--precision fp32] [--variants default trim-100 mmap-1M]

Every process builds the same small model on the same engine. They take turns of a few steps, so that a machine whose speed drifts slows
all of them. Prints, for each, the resident memory in MB after some of the steps, its growth after step 200, CPU milliseconds per step (all
threads, median of the turns), the same as a ratio to the first variant, and whether the losses are the first variant's to the last digit.

A variant is one or more of these words, joined by `+`: `default` (nothing is set), `contiguous`
(DeepSpeed's contiguous_gradients), `trim-N` (malloc_trim every N steps), `mmap-SIZE`, `top-SIZE` and `arenas-N` (mallopt's
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX at the start of the process).
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research.cli.verbs import count
from research.cluster.exit_codes import refusing

TURN = 50
"""Steps that a process takes before the next one has its turn."""
SETTLED = 200
"""The step from which growth is counted: by then everything has been allocated once."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
VARIANTS = ("default", "contiguous", "trim-100", "contiguous+trim-100", "mmap-128K", "mmap-1M", "arenas-1", "top-128K")


def size(text: str) -> int:
    """'128K' -> 131072."""
    unit = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


def train(words: list[str], precision: str) -> None:
    """The process of one variant: reads a number of steps from each line of standard input, takes them, and prints a line of JSON."""
    library = ctypes.CDLL(None)
    numbers = {word.partition("-")[0]: size(word.partition("-")[2]) for word in words if word.partition("-")[2][:1].isdecimal()}
    for word, parameter in (("mmap", M_MMAP_THRESHOLD), ("top", M_TRIM_THRESHOLD), ("arenas", M_ARENA_MAX)):
        if word in numbers and not library.mallopt(parameter, numbers[word]):
            raise SystemExit(f"mallopt refused {word}-{numbers[word]}")

    import torch

    from models import gpt
    from models.config import GPT
    from parallel import distributed
    from parallel.engines import engine as engines
    from parallel.engines.deepspeed_config import EngineSettings
    from parallel.engines.micro_batch import MicroBatch
    from parallel.grid import make_grid

    shape = GPT(
        num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=4, ffn_size=512, vocab_size=391, seq_length=64, norm="layernorm",
        norm_eps=1e-5, position="learned", mlp="gelu", residual="pre_norm", init="gpt2", bias=True, qkv_bias=True, qk_norm=False,
        tied=True, embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.set_num_threads(1)
    distributed.start(0, 1, 0, None)
    derive = engines.derive

    def derived(settings: EngineSettings, cuda: bool) -> dict:
        found = derive(settings, cuda)
        found["zero_optimization"]["contiguous_gradients"] |= "contiguous" in words
        return found

    engines.derive = derived
    settings = EngineSettings(precision, 1, 2, 2, clip=1.0, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    engine = engines.make_engine(gpt.layers(shape, make_grid(1, 1), seed=0), gpt.TokenLoss(391, 0.0, None), make_grid(1, 1), settings)
    draw, taken = torch.Generator().manual_seed(0), 0
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        losses, before = [], time.process_time()
        for _ in range(int(line)):
            batches = []
            for _ in range(2):
                tokens = torch.randint(0, 391, (2, 65), generator=draw)
                batches.append(MicroBatch(tokens[:, :-1], (tokens[:, 1:], torch.full((2, 64), 1 / 128))))
            losses.append(engine.train_batch(batches, 1e-3).hex())
            taken += 1
            if "trim" in numbers and taken % numbers["trim"] == 0:
                library.malloc_trim(0)
        seconds = (time.process_time() - before) / int(line)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
        print(json.dumps({"resident": resident, "seconds": seconds, "losses": losses}), flush=True)


def compare(variants: list[str], steps: int, precision: str) -> None:
    """Trains all variants in turns and prints the table."""
    command = [sys.executable, __file__, "--precision", precision, "--train"]
    processes = [
        subprocess.Popen([*command, variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for variant in variants
    ]
    turns: dict[str, list[dict]] = {variant: [] for variant in variants}
    try:
        for process in processes:
            while process.stdout.readline() != '"ready"\n':
                if process.poll() is not None:
                    raise SystemExit("a process has ended")
        for _ in range(steps // TURN):
            for variant, process in zip(variants, processes, strict=True):
                process.stdin.write(f"{TURN}\n")
                process.stdin.flush()
                turns[variant].append(json.loads(process.stdout.readline()))
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()
    shown = [step for step in (TURN, SETTLED, 500, 1000, 1500, 2000, 3000, 4000) if step <= steps]
    print(f"{precision}, resident MB after step")
    print(f"{'variant':<24}" + "".join(f"{step:>8}" for step in shown) + f"{'growth':>9}{'ms/step':>9}{'ratio':>7}  losses")
    for variant, found in turns.items():
        resident = [turn["resident"] for turn in found]
        seconds, first = ([turn["seconds"] for turn in turns[name]] for name in (variant, variants[0]))
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        growth = max(resident[SETTLED // TURN :], default=resident[-1]) - resident[min(SETTLED // TURN, len(resident)) - 1]
        same = all(turn["losses"] == other["losses"] for turn, other in zip(found, turns[variants[0]], strict=True))
        cells = "".join(f"{resident[step // TURN - 1]:8.0f}" for step in shown)
        print(f"{variant:<24}{cells}{growth:9.0f}{1e3 * statistics.median(seconds):9.2f}{ratio:7.3f}  {'equal' if same else 'DIFFER'}")


def main() -> None:
    """Parses the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=2000)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train.split("+"), arguments.precision)
    else:
        compare(arguments.variants, arguments.steps, arguments.precision)


if __name__ == "__main__":
    with refusing():
        main()
