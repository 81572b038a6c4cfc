"""A small experiment for tests, and a helper that returns the message of a Mistake."""

from collections.abc import Callable
from typing import Any

import pytest

from parallel.errors import Mistake
from research.config import GPT, Data, Experiment, Optimizer, Parallel, Schedule

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 192,
    "num_heads": 6,
    "num_kv_heads": 6,
    "ffn_size": 768,
    "vocab_size": 8192,
    "seq_length": 128,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "mlp": "gelu",
    "residual": "pre_norm",
    "init": "gpt2",
    "bias": True,
    "qkv_bias": True,
    "qk_norm": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "mlp_dropout": 0.0,
    "attention_dropout": 0.0,
    "tied": True,
}
OPTIMIZER: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
    "decay": "cosine",
    "warmup_steps": 30,
    "min_lr": 3e-4,
    "label_smoothing": 0.0,
}
SCHEDULE: dict[str, Any] = {"steps": 300, "batch_size": 16, "micro_batch_size": 8, "validate_every": 100}


def example(**groups: dict[str, Any]) -> Experiment:
    """The example with changes by group: example(model={"num_heads": 3}, parallel={"tensor": 3})."""
    changes = {name: groups.pop(name, {}) for name in ("model", "schedule", "optimizer", "parallel")}
    return Experiment(
        **{
            "question": "does it work?",
            "parent": None,
            "model": GPT(**MODEL | changes["model"]),
            "data": Data(
                train="builtin:state_of_the_union/train", validation="builtin:state_of_the_union/val", tokenizer="builtin:bpe-8192"
            ),
            "schedule": Schedule(**SCHEDULE | changes["schedule"]),
            "optimizer": Optimizer(**OPTIMIZER | changes["optimizer"]),
            "parallel": Parallel(**changes["parallel"]),
            "precision": "fp32",
            "seed": 1,
        }
        | groups
    )


def sentence(act: Callable[[], Any]) -> str:
    """The message of the Mistake that `act` raises, which must be one line with a way out (→)."""
    with pytest.raises(Mistake) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert "→" in message
    return message
