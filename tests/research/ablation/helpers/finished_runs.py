"""Run folders written by hand, as real runs write them: config.json, run.json, metrics.jsonl, and a checkpoint's manifest if asked for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import File, Logical, Manifest, Piece
from research.config import Experiment, serialization
from research.tracking import run_folder
from research.tracking.metrics import JsonLines
from research.tracking.run_folder import FINISHED, RunFolder
from tests.research.helpers.example import example

TOKENS_PER_STEP, NUM_TOKENS, NUM_BYTES = 2048, 20_000, 90_000


def write_run(
    runs: Path,
    name: str,
    seed: int,
    losses: Sequence[float],
    status: str = FINISHED,
    num_bytes: int = NUM_BYTES,
    fingerprint: str | None = None,
    seconds_per_step: float = 0.5,
    every: int = 100,
    experiment: Experiment | None = None,
    **groups: Any,
) -> RunFolder:
    """A run that validates every `every` steps with these losses. `groups`: settings by group, as `example` takes them."""
    steps = every * len(losses)
    folder = run_folder.create(runs, name)
    schedule = {"steps": steps, "validate_every": every} | groups.pop("schedule", {})
    run_folder.start(folder, layout="tensor 1", precision="fp32", steps=steps, commit="abc1234")
    serialization.save(experiment or example(seed=seed, schedule=schedule, **groups), folder.config)
    file = JsonLines(folder.metrics)
    for i, loss in enumerate(losses, start=1):
        axes = {
            "progress/step": every * i,
            "progress/tokens": TOKENS_PER_STEP * every * i,
            "progress/seconds": seconds_per_step * every * i,
        }
        file.write({"train/loss": loss + 0.1, "train/ppl": math.exp(min(loss, 50)), "perf/tokens_per_second": 4000.0, **axes})
        bits = loss * NUM_TOKENS / math.log(2) / num_bytes
        file.write({"val/loss": loss, "val/ppl": 1.0, "val/bits_per_byte": bits, "val/tokens": NUM_TOKENS, **axes})
    file.close()
    if fingerprint:
        checkpoint = folder.checkpoints / f"step_{steps:06d}"
        checkpoint.mkdir()
        weights = {"w": Logical((1,), "float32", (Piece("w.safetensors", "w", 0, 0, 1),))}
        manifest = Manifest({"step": steps, "data": fingerprint}, {"w.safetensors": File(4, "0" * 64)}, {"weights": weights})
        (checkpoint / "manifest.json").write_text(manifest.text())
    if status != "running":
        run_folder.end(folder, status, "" if status == FINISHED else "a reason", 0)
    return folder
