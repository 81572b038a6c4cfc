"""The parts of training that an experiment names: the order of its data, its loss and its optimizer.

Loss and optimizer are either registered here or classes of its variant.py.

The learning-rate decays are in research/training/schedule.py, measurements in research/training/measurement.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import ProcessGroup

from models.config import chosen
from models.gpt import TokenLoss
from parallel.engines.engine import Loss
from parallel.engines.optimizer_state import state_names_of
from parallel.errors import Mistake
from research.config import Experiment
from research.config.schema import LOSSES, OPTIMIZERS
from research.data.batches import Sampler, one_source
from research.data.prepare import Corpus

LOSS_CLASSES: dict[str, Callable[..., Loss]] = {LOSSES[0]: TokenLoss}
OPTIMIZER_CLASSES: dict[str, type | None] = {OPTIMIZERS[0]: None}
"""None stands for the optimizer that DeepSpeed creates from its own configuration, torch's AdamW."""


def sampler(experiment: Experiment, corpus: Corpus) -> Sampler:
    """What training reads, in the order that the experiment's seed gives."""
    schedule = experiment.schedule
    return one_source(corpus.train, experiment.model.seq_length, schedule.batch_size, schedule.micro_batch_size, experiment.seed)


def training_loss(experiment: Experiment, group: ProcessGroup | None, variants: Mapping[str, Any]) -> Loss:
    """The loss that training minimises. A class of variant.py has the constructor and the call of models.gpt.TokenLoss."""
    make = chosen("loss", experiment.loss, LOSS_CLASSES, variants)
    return make(experiment.model.vocab_size, experiment.optimizer.label_smoothing, group)


def held_out_loss(experiment: Experiment, group: ProcessGroup | None) -> Loss:
    """The loss of a validation: the plain cross entropy, whatever training minimises, so that bits per byte can be compared."""
    return TokenLoss(experiment.model.vocab_size, 0.0, group)


def optimizer_class(experiment: Experiment, variants: Mapping[str, Any]) -> type | None:
    """The optimizer's class; None for AdamW. A class of variant.py is a torch.optim.Optimizer, created as

        Class(groups, lr=…, betas=…, eps=…, weight_decay=…)

    with parameter groups that bring their own weight_decay. It must work element by element, because ZeRO passes it flattened
    parts of the parameters, and its attribute `state_names` names the tensors that it keeps per parameter; a Mistake if it does not.
    """
    found = chosen("optimizer.name", experiment.optimizer.name, OPTIMIZER_CLASSES, variants)
    if found is None:
        return None
    if not isinstance(found, type):
        raise Mistake(f"optimizer.name = {experiment.optimizer.name!r} names no class → write a subclass of torch.optim.Optimizer")
    state_names_of(found)
    return found
