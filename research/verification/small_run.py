"""Runs the real training loop on forked ranks of this machine, with the experiment's structure and code, small sizes and a little text.

It does what `launch.py` does, without the seconds that starting an interpreter and importing torch take. `torture` and the tests use it.
"""

import contextlib
import gc
import itertools
import json
import os
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from models.config import GPT
from parallel.errors import Mistake
from research import ROOT
from research.cluster import forked_ranks
from research.cluster.environment import LOCALHOST, Ranks
from research.config import Experiment, Pairs, serialization
from research.config.experiment_folder import LoadedExperiment
from research.config.sources import texts_to_train_on
from research.data import documents
from research.data.special_tokens import PLUS
from research.data.splits import SPLIT
from research.data.stores import STORE
from research.data.tokenizer import declared_vocab_size
from research.tracking.run_folder import RunFolder, every
from research.verification.layouts import of_fields

CHARACTERS = 40_000
"""Length of the training text."""
SIZES: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 2,
        "num_encoder_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 64,
        "seq_length": 16,
        "source_length": 16,
    },
    "schedule": {"steps": 12, "batch_size": 8, "micro_batch_size": 2, "validate_every": 0, "log_every": 1},
    "checkpoints": {"every": 3},
    "evaluate": {"every": 0},
    "sample": {"every": 0},
    "track": {"mode": "disabled"},
}
"""The settings that are small or switched off. Tasks and prompts are off because the context is too short for them.

If the experiment has grouped queries, they stay grouped."""
TOKENIZER = "builtin:bpe-384"
VOCABULARIES = (391, 491)
"""The size of the vocabulary: the first that has room for the special tokens. No tensor degree divides one of them."""

MOST_LETTERS = 5
"""Of the sides of small pairs."""
NOT_TEXT = (STORE, SPLIT)
BUILTIN_TEXTS = {"train": "state_of_the_union/train", "validation": "state_of_the_union/val"}


def small(loaded: LoadedExperiment, place: Path, changes: dict[str, dict[str, Any]] | None = None) -> LoadedExperiment:
    """The experiment with small sizes. It reads the texts in `place`, and its run folders go to `place`/runs."""
    settings = serialization.resolved(loaded.experiment)
    del settings["schema"]
    texts = {name: str(place / f"{name}{suffix_of(loaded.experiment)}") for name in ("train", "validation")}
    tokenizer = with_special_tokens(TOKENIZER, loaded.experiment.data.tokenizer)
    data = {"data": texts | {"tokenizer": tokenizer, "cache": str(place / "cache")}, "track": {"runs": str(place / "runs")}}
    for group, values in itertools.chain(SIZES.items(), data.items(), (changes or {}).items()):
        settings[group] = settings[group] | values if isinstance(values, dict) else values
    named = settings["data"]["tokenizer"]
    needed = declared_vocab_size(named) if named.startswith(documents.BUILTIN) else 0
    sizes = {"vocab_size": next(size for size in VOCABULARIES if size >= needed)} | (changes or {}).get("model", {})
    settings["model"] = of_fields(loaded.experiment.model, settings["model"] | sizes)
    if isinstance(loaded.experiment.model, GPT) and loaded.experiment.model.num_kv_heads == loaded.experiment.model.num_heads:
        settings["model"]["num_kv_heads"] = settings["model"]["num_heads"]
    settings["optimizer"]["warmup_steps"] = min(4, settings["optimizer"]["warmup_steps"])
    return LoadedExperiment(serialization.build(settings), loaded.folder, loaded.name)


def with_special_tokens(tokenizer: str, other: str) -> str:
    """A built-in tokenizer with the special tokens that another one has, such as builtin:bpe-384+fim for builtin:bpe-8192+fim."""
    base, plus, names = other.partition(PLUS)
    return f"{tokenizer}{plus}{names}" if base.startswith(documents.BUILTIN) else tokenizer


def suffix_of(experiment: Experiment) -> str:
    """Of the texts: lines of pairs, or running text."""
    return ".jsonl" if isinstance(experiment.data.examples, Pairs) else ".txt"


def write_texts(loaded: LoadedExperiment, place: Path) -> None:
    """Writes the beginning of the experiment's own training text and of its validation text to `place`.

    A token store holds no text and a split is none of its own: the built-in text stands for them.
    """
    place.mkdir(parents=True, exist_ok=True)
    data = loaded.experiment.data
    for name, named, most in (("train", texts_to_train_on(data.train), CHARACTERS), ("validation", [data.validation], CHARACTERS // 20)):
        texts = tuple(text for text in named if not text.startswith(NOT_TEXT)) or f"{documents.BUILTIN}{BUILTIN_TEXTS[name]}"
        text, source = "", documents.documents(texts, ROOT)
        while len(text) < most and (document := next(source, None)) is not None:
            text += document[: most - len(text)]
        path = place / f"{name}{suffix_of(loaded.experiment)}"
        path.write_text(pairs_of_words(text) if path.suffix == ".jsonl" else text, encoding="utf-8")


def pairs_of_words(text: str) -> str:
    """Lines of JSON: each word of the text, and as its target the word backwards. Both have room in a small sample."""
    words = (word[:MOST_LETTERS] for word in text.split())
    return "".join(json.dumps({"source": word, "target": word[::-1]}) + "\n" for word in words)


def start(loaded: LoadedExperiment, world: int, output: Path, resume: str = "never", prelude: Any = None) -> list[ForkServerProcess]:
    """Starts `world` ranks that train the experiment, and returns their processes. What they print is appended to the file `output`.

    `prelude` is a function at module level that every rank calls with its number before it trains; tests break things in it.
    """
    settings = serialization.resolved(loaded.experiment)
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        free_port = probe.getsockname()[1]
    arguments = (settings, str(loaded.folder), loaded.name, world, free_port, resume, str(output), prelude)
    return forked_ranks.start(_rank, [(rank, *arguments) for rank in range(world)])


def newest_run(experiment: Experiment) -> RunFolder:
    """The newest run folder of an experiment that `small` returned."""
    return max(every(Path(experiment.track.runs)), key=lambda folder: folder.run.stat().st_mtime)


def _rank(rank: int, settings: dict, folder: str, name: str, world: int, port: int, resume: str, output: str, prelude: Any) -> None:
    """What a rank's process runs. It ends with the exit code that launch.py would have."""
    gc.freeze()  # the objects of the fork server are never garbage

    # Standard output and error go to one file.
    with Path(output).open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    del settings["schema"]
    loaded = LoadedExperiment(serialization.build(settings), Path(folder), name)
    ranks = Ranks(rank, rank, world, world, "deepspeed" if world > 1 else "python", LOCALHOST, port, cores=1)
    if prelude is not None:
        prelude(rank)
    from research.config import overrides
    from research.reliability.parents import Parents
    from research.reliability.peers import Lost
    from research.training import loop
    from research.training.job import resolve

    try:
        loop.train(resolve(loaded, [], ranks, overrides.Options(resume=resume), []), Parents("python"))
    except Lost as lost:
        sys.stderr.write(f"error  (rank {rank}) {lost}\n")
        raise SystemExit(1) from None
    except Mistake as mistake:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error  (rank {rank}) {mistake}\n")
        raise SystemExit(mistake.code) from None
