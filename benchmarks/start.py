"""The start of a run on a token store of a billion tokens beside one of ten thousand: seconds from the command to its first step.

    python benchmarks/start.py [--tokens 1000000000] [--repetitions 5]

Both stores are as Megatron-LM writes them, without a PREFIX.json; the .bin of the large one is one hole of a sparse file. The first start
reads a store once and is shown apart. Later starts take turns, so that a machine whose speed drifts slows both; their medians are compared.
"""

import argparse
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from research import ROOT
from research.data.tokenizer import train_bpe

SMALL = 10_000
LENGTH = 1000
"""Tokens of a document."""
TINY = {
    **{"model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 2, "model.num_kv_heads": 2, "model.ffn_size": 64},
    **{"model.vocab_size": 300, "model.seq_length": 32, "data.validation": "held_out.jsonl", "data.tokenizer": "tokenizer.json"},
    **{
        "schedule.steps": 2,
        "schedule.batch_size": 2,
        "schedule.micro_batch_size": 2,
        "schedule.log_every": 1,
        "schedule.validate_every": 0,
    },
    **{"optimizer.warmup_steps": 0, "track.mode": "disabled", "sample.every": 0, "evaluate.every": 0},
}
FIRST_STEP = "    1 "
"""How the line of the first step begins."""


def write_store(prefix: Path, tokens: int) -> None:
    """A store of zeros in documents of LENGTH tokens, uint16."""
    documents = tokens // LENGTH
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * LENGTH * documents)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        file.write(np.full(documents, LENGTH, "<i4").tobytes())
        file.write((2 * LENGTH * np.arange(documents)).astype("<i8").tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())


def seconds_to_first_step(folder: Path, name: str) -> float:
    """Launches a tiny run on one rank and waits for the line of its first step, then for its end."""
    settings = {**TINY, "data.train": f"store:{folder / name}", "data.cache": folder / "cache", "track.runs": folder / "runs"}
    for key in ("data.validation", "data.tokenizer"):
        settings[key] = folder / str(TINY[key])
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "experiments" / "gpt_sotu" / "launch.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        lines, found = [], 0.0
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line)
            if line.startswith(FIRST_STEP) and not found:
                found = time.perf_counter() - began
    if run.returncode or not found:
        raise SystemExit("".join(lines))
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**9, help="tokens of the large store")
    parser.add_argument("--repetitions", type=int, default=5, help="starts of each run after its first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(train_bpe(["the people of the United States"], 300))
        (folder / "held_out.jsonl").write_text(
            '{"text": "We the people of the United States, in order to form a more perfect union"}\n' * 9
        )
        sizes = {"large": arguments.tokens, "small": SMALL}
        for kind, tokens in sizes.items():
            write_store(folder / kind, tokens)
        first = {kind: seconds_to_first_step(folder, kind) for kind in sizes}
        later: dict[str, list[float]] = {kind: [] for kind in sizes}
        for _ in range(arguments.repetitions):
            for kind in sizes:
                later[kind].append(seconds_to_first_step(folder, kind))
    median = {kind: statistics.median(times) for kind, times in later.items()}
    print("store          tokens   first start   later starts, median (least to most)")
    for kind, tokens in sizes.items():
        print(f"{kind}  {tokens:>15,}  {first[kind]:>10.2f} s  {median[kind]:>10.2f} s ({min(later[kind]):.2f} to {max(later[kind]):.2f})")
    difference = median["large"] - median["small"]
    print(f"the large store's later start takes {difference:+.2f} s, {median['large'] / median['small']:.2f} times as long")


if __name__ == "__main__":
    main()
