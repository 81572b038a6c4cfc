"""The settings of an experiment, as its config.py names them."""

from research.config.schema import (
    GPT,
    Checkpoints,
    Data,
    Evaluate,
    Experiment,
    Optimizer,
    Parallel,
    Sample,
    Schedule,
    Track,
    Watch,
)

__all__ = ["GPT", "Checkpoints", "Data", "Evaluate", "Experiment", "Optimizer", "Parallel", "Sample", "Schedule", "Track", "Watch"]
