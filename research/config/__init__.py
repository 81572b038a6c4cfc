"""The settings of an experiment: the classes that a config.py imports."""

from research.config.examples import FillInMiddle, Masked, Pairs, Spans, Supervised
from research.config.schema import (
    BERT,
    GPT,
    T5,
    Checkpoints,
    Data,
    Evaluate,
    Experiment,
    Optimizer,
    Parallel,
    Profile,
    Sample,
    Schedule,
    Source,
    Track,
    Watch,
)

__all__ = [
    "BERT",
    "GPT",
    "Checkpoints",
    "Data",
    "Evaluate",
    "Experiment",
    "FillInMiddle",
    "Masked",
    "Optimizer",
    "Pairs",
    "Parallel",
    "Profile",
    "Sample",
    "Schedule",
    "Source",
    "Spans",
    "Supervised",
    "T5",
    "Track",
    "Watch",
]
