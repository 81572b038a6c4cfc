"""A small experiment for tests, and a helper that returns the message of a Mistake."""

from collections.abc import Callable
from typing import Any

import pytest

from parallel.errors import Mistake
from research.config import BERT, GPT, T5, Data, Experiment, Masked, Optimizer, Parallel, Schedule, Spans

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


ENCODER: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 192,
    "num_heads": 6,
    "ffn_size": 768,
    "vocab_size": 8192,
    "seq_length": 128,
    "norm_eps": 1e-6,
    "init": "gpt2",
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "mlp_dropout": 0.0,
    "attention_dropout": 0.0,
}
BERT_MODEL: dict[str, Any] = ENCODER | {"mlp": "gelu", "residual": "post_norm", "token_types": 2, "sentence_head": False}
T5_MODEL: dict[str, Any] = ENCODER | {
    "num_encoder_layers": 4,
    "source_length": 64,
    "mlp": "geglu",
    "relative_buckets": 32,
    "relative_distance": 128,
    "tied": True,
}


def bert(**groups: Any) -> Experiment:
    """The example with a BERT and masked samples."""
    return _with_model(BERT(**BERT_MODEL | groups.pop("model", {})), Masked(rate=0.15), groups)


def t5(**groups: Any) -> Experiment:
    """The example with a T5 and samples whose spans are replaced."""
    return _with_model(T5(**T5_MODEL | groups.pop("model", {})), Spans(rate=0.15, mean_length=3), groups)


def _with_model(model: BERT | T5, examples: Masked | Spans, groups: dict[str, Any]) -> Experiment:
    given = example(**groups)
    data = Data(**dict(given.data) | {"examples": examples})
    return Experiment(**dict(given) | {"model": model, "data": data})
