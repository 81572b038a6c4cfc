"""What of a rank's process matters to the next step and lies outside of the engine: random generators, and the machine's arithmetic."""

import base64
import random
from typing import Any

import deepspeed
import numpy as np
import torch

from parallel.engines.engine import Engine
from parallel.errors import Mistake


def generators() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's own generators on this rank, as JSON has them.

    Nothing of Tessera draws from them while it trains (dropout is a hash), but an experiment's variant may.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "python": [version, _packed(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [name, _packed(np.asarray(keys)), int(position), int(has_gauss), float(cached)],
        "torch": _packed(torch.get_rng_state().numpy()),
    }
    return found | ({"cuda": _packed(torch.cuda.get_rng_state().numpy())} if torch.cuda.is_available() else {})


def set_generators(found: Any) -> None:
    """Sets what `generators` told. A Mistake where it is something else; then some may be set."""
    try:
        version, words, gauss = found["python"]
        random.setstate((version, tuple(int(word) for word in _unpacked(words, np.uint32)), gauss))
        name, keys, position, has_gauss, cached = found["numpy"]
        np.random.set_state((name, _unpacked(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.from_numpy(_unpacked(found["torch"], np.uint8)))
        if torch.cuda.is_available() and "cuda" in found:
            torch.cuda.set_rng_state(torch.from_numpy(_unpacked(found["cuda"], np.uint8)))
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise Mistake(f"the checkpoint's random generators cannot be set ({error!s:.100}) → use another checkpoint of the run") from error


def arithmetic(engine: Engine) -> dict[str, Any]:
    """What the bits of a step depend on beside the experiment: two runs that tell the same here go on bit for bit alike."""
    grid, settings = engine.grid, engine.settings
    cuda = engine.device.type == "cuda"
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
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
    }


def differences(facts: dict[str, Any], engine: Engine) -> dict[str, tuple[Any, Any]]:
    """{"machine.threads": (then, now), …}: why a run that goes on from a checkpoint with `facts` is not bit for bit the same.

    Empty: it is. Anything but a change of the layout or the machine (another learning rate, other data) is not looked at here.
    """
    then, now = facts, arithmetic(engine)
    pairs = {
        f"{table}.{name}": (then[table].get(name) if isinstance(then.get(table), dict) else None, value)
        for table, entries in now.items()
        for name, value in entries.items()
    }
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _unpacked(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
