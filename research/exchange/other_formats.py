"""Recognises checkpoints of other programs, which import cannot read, and says what can be done with each. Imports no torch."""

import contextlib
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from parallel.errors import Mistake
from parallel.regular_files import open_regular

MOST_ENTRIES = 10_000
"""The most entries of a folder that are looked at."""
HF_CONFIG = "config.json"
PICKLES = "in pickles, which are programs and are not opened"
MEGATRON = (
    "Megatron Bridge (AutoBridge.export_ckpt) writes it as a Hugging Face folder, which can be imported; of an old Megatron-LM, "
    "tools/checkpoint/convert.py makes a new one first"
)
NEOX = "GPT-NeoX's tools/ckpts/convert_neox_to_hf.py writes it as a Hugging Face folder, which can be imported"
ZERO = "load it with the program that wrote it, save the model with transformers' save_pretrained, and import that folder"


def refuse_other_formats(path: Path) -> None:
    """A Mistake if the folder is a checkpoint of Megatron-LM, GPT-NeoX, DeepSpeed, peft, …, or a run of ours.

    A folder with a config.json is left to the reader of Hugging Face folders, whatever else it holds.
    """
    names = _names_in(path)
    if HF_CONFIG in names and "run.json" not in names and "manifest.json" not in names:
        return
    for is_there, what, way_out in FORMATS:
        if found := is_there(names):
            raise Mistake(f"{path} is {what} ({_evidence(path, found)}) → {way_out}")


def _names_in(path: Path) -> list[str]:
    """The names in a folder, and in folders of one step of a checkpoint as FOLDER/NAME, sorted."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        for entry in sorted(islice(path.iterdir(), MOST_ENTRIES)):
            names.append(entry.name)
            if entry.is_dir() and STEP.fullmatch(entry.name):
                names += [f"{entry.name}/{inner.name}" for inner in sorted(islice(entry.iterdir(), MOST_ENTRIES))]
    return names


def _evidence(path: Path, name: str) -> str:
    """The name that gave the format away; with its text if it is a pointer to a step."""
    if name in POINTERS:
        with contextlib.suppress(OSError):
            with open_regular(path / name) as file:
                text = file.read(40).decode("ascii", errors="replace").strip()
            return f"{name}: {text}" if text.isprintable() else name
    return name


def _any(*patterns: str) -> Callable[[Iterable[str]], str | None]:
    """A function that returns the first name whose last part matches the first pattern, or else the next one, or None."""
    return lambda names: next((name for pattern in patterns for name in names if re.fullmatch(pattern, name.rpartition("/")[2])), None)


POINTERS = ("latest_checkpointed_iteration.txt", "latest")
STEP = re.compile(r"iter_\d+|global_step\d+|mp_rank_\d+(_\d+)*|release|step_?\d+|checkpoints")
FORMATS: list[tuple[Callable[[Iterable[str]], str | None], str, str]] = [
    (
        _any(r"run\.json|manifest\.json"),
        "a run or a checkpoint of this program",
        "it needs no import: generate, evaluate, serve and export take it as it is, and init_from begins a run with it",
    ),
    (
        _any(r"layer_\d+-(model_\d+-)?model_states\.pt"),
        f"a checkpoint of GPT-NeoX or Megatron-DeepSpeed, one file for each layer and tensor rank, {PICKLES}",
        NEOX,
    ),
    (
        _any(r"latest_checkpointed_iteration\.txt", r"iter_\d{7}|model_optim_rng\.pt|mp_rank_\d\d(_\d\d\d)*"),
        f"a checkpoint of Megatron-LM, cut for one layout, {PICKLES}",
        MEGATRON,
    ),
    (
        _any(r"mp_rank_\d\d_model_states\.pt|(bf16_)?zero_pp_rank_\d+_mp_rank_\d\d_.*\.pt"),
        f"a checkpoint of DeepSpeed, cut for one layout, {PICKLES}",
        ZERO,
    ),
    (
        _any(r".*\.distcp"),
        "a distributed checkpoint of torch (FSDP, Megatron Core), whose metadata are a pickle",
        ZERO,
    ),
    (
        _any(r"adapter_config\.json|adapter_model\.(safetensors|bin)"),
        "an adapter (peft), which holds only changes of another model",
        "load both with peft, call merge_and_unload().save_pretrained(OTHER), and import that folder",
    ),
    (
        _any(r"consolidated\..*|params\.json"),
        "a model in the format of its makers (Meta, Mistral)",
        "take the model's Hugging Face folder, or write it with transformers' convert_llama_weights_to_hf.py",
    ),
    (
        _any(r"flax_model.*\.msgpack|tf_model.*\.h5|model\.ckpt.*|.*\.nemo"),
        "a model for another framework than torch",
        "take the model's Hugging Face folder with safetensors",
    ),
]  # fmt: skip
"""(the name that shows it, what it is, what can be done with it); the first one that is found counts."""
