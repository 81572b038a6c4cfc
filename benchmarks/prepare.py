"""Memory and speed of `prepare` on generated text: the peak of resident memory, summed over its processes, at several sizes.

    python benchmarks/prepare.py --gigabytes 0.2 2 --tokenizer builtin:bpe-8192 --workers 1

The text has 50,000 different words, as frequent as Zipf's law says, in documents of 2 to 2,000 words; or with --one-line it is one document
without a newline. What is summed over processes counts shared pages several times, so the figure is an upper bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
WORDS, SECONDS = 50_000, 0.05
BLOCKS = 64
"""Blocks of 1 MB that are drawn. A longer text repeats them."""


def generate(path: Path, num_bytes: int, one_line: bool) -> None:
    """Writes about `num_bytes` of text: JSON lines, or one line of plain text."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 11, WORDS)]
    chances = 1 / np.arange(1, WORDS + 1)
    chances /= chances.sum()
    written, blocks = 0, list[str]()
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            if len(blocks) == BLOCKS:
                written += sum(map(file.write, blocks))
                continue
            numbers = draw.choice(WORDS, 200_000, p=chances)
            cuts = np.cumsum(draw.integers(2, 2000, 300))
            texts = [" ".join(words[i] for i in part) for part in np.split(numbers, cuts[cuts < len(numbers)])]
            block = " ".join(texts) + " " if one_line else "".join(json.dumps({"text": text}) + "\n" for text in texts)
            written += file.write(block)
            blocks.append(block)


def measured(command: list[str]) -> tuple[float, float, str]:
    """(peak of resident bytes over the process and its children, seconds, what it printed)."""
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            total = 0
            try:
                for one in [process, *process.children(recursive=True)]:
                    total += one.memory_info().rss
            except psutil.NoSuchProcess:
                pass
            peak = max(peak, total)
            time.sleep(SECONDS)
        log.seek(0)
        said = log.read()
    if process.returncode:
        raise SystemExit(said)
    return peak, time.monotonic() - began, said


def main() -> None:
    """Prints a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2, 2.0])
    parser.add_argument("--tokenizer", default="builtin:bpe-8192")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--one-line", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where the text is written (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for gigabytes in arguments.gigabytes:
            text = Path(folder) / f"text.{'txt' if arguments.one_line else 'jsonl'}"
            generate(text, int(gigabytes * 1e9), arguments.one_line)
            for workers in arguments.workers:
                command = [sys.executable, "-m", "research", "prepare", str(text), "--as", "generated", "--corpora", folder]
                command += ["--tokenizer", arguments.tokenizer, "--workers", str(workers), "--replace"]
                peak, seconds, _ = measured(command)
                size = os.path.getsize(text)
                figures = f"peak {peak / 1e6:.0f} MB · {seconds:.0f} s · {size / seconds / 1e6:.2f} MB/s"
                print(f"{size / 1e9:.2f} GB · {arguments.tokenizer} · workers {workers} · {figures}", flush=True)


if __name__ == "__main__":
    main()
