"""The state of a rank's process outside of the engine: its random generators, and the layout and machine that its arithmetic depends on."""

import base64
import random
from typing import Any

import deepspeed
import numpy as np
import torch

from parallel.engines.engine import Engine
from parallel.errors import Mistake


def generators() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators on this rank, as JSON values.

    Tessera itself does not draw from them while it trains (dropout is a hash), but an experiment's variant may.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, _packed(np.array(internal, dtype=np.uint32)), gauss],
        "numpy": [name, _packed(np.asarray(keys)), int(position), int(has_gauss), float(cached)],
        "torch": _packed(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _packed(torch.cuda.get_rng_state().numpy())
    return states


def set_generators(states: Any) -> None:
    """Sets what `generators` returned. A Mistake if it has another form; then some generators may already be set."""
    try:
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(int(number) for number in _unpacked(internal, np.uint32)), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((name, _unpacked(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.from_numpy(_unpacked(states["torch"], np.uint8)))
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(torch.from_numpy(_unpacked(states["cuda"], np.uint8)))
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise Mistake(f"the checkpoint's random generators cannot be set ({error!s:.100}) → use another checkpoint of the run") from error


def arithmetic(engine: Engine) -> dict[str, Any]:
    """What the bits of a step depend on besides the settings and the code: where all are equal, runs continue bit for bit alike.

    On GPUs only if their kernels are deterministic (`distributed.use_deterministic_kernels`).
    """
    grid, settings = engine.grid, engine.settings
    cuda = engine.device.type == "cuda"
    kernels = {"deterministic": torch.are_deterministic_algorithms_enabled()} if cuda else {}  # a CPU's kernels always are
    return {
        "layout": {
            "pipe": grid.pipe,
            "data": grid.data,
            "tensor": grid.tensor,
            "sequence": grid.sequence,
            "zero_stage": max(1, settings.zero_stage),
            "offload_optimizer": settings.offload_optimizer,
            "offload_parameters": settings.offload_parameters,
            "precision": settings.precision,
            "micro_batch_size": settings.micro_batch_size,
            "micro_batches": settings.micro_batches,
        },
        "machine": {
            "world": grid.world,
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            **kernels,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
    }


def differences(facts: dict[str, Any], engine: Engine) -> dict[str, tuple[Any, Any]]:
    """Why a run that resumes from a checkpoint with `facts` is not bit for bit the same: {"machine.threads": (then, now), …}.

    Only the layout and the machine are compared here, not the settings, the code or the data (research/training/resume.py).
    """
    changed = {}
    for table, entries in arithmetic(engine).items():
        saved = facts.get(table)
        for name, now in entries.items():
            then = saved.get(name) if isinstance(saved, dict) else None
            if then != now:
                changed[f"{table}.{name}"] = (then, now)
    return changed


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
