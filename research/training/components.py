"""The parts of training that an experiment names: its loss and its optimizer, registered here or classes of its variant.py.

The order of its data is in research/training/sampler.py, the learning-rate decays are in research/training/schedule.py, and measurements
in research/training/measurement.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import ProcessGroup

from models.bert import PretrainingLoss
from models.config import chosen
from models.encoder_config import BERT, AnyModel
from models.gpt import TokenLoss
from parallel.engines.engine import Loss
from parallel.engines.optimizer_state import state_names_of
from parallel.errors import Mistake
from research.config import Experiment
from research.config.schema import LOSSES, OPTIMIZERS

LOSS_CLASSES: dict[str, Callable[..., Loss]] = {LOSSES[0]: TokenLoss}
OPTIMIZER_CLASSES: dict[str, type | None] = {OPTIMIZERS[0]: None}
"""None stands for the optimizer that DeepSpeed creates from its own configuration, torch's AdamW."""


def training_loss(experiment: Experiment, group: ProcessGroup | None, variants: Mapping[str, Any]) -> Loss:
    """The loss that training minimises. A class of variant.py has the constructor and the call of models.gpt.TokenLoss.

    With a sentence head, cross entropy is that of the tokens and that of the sentences.
    """
    make = chosen("loss", experiment.loss, LOSS_CLASSES, variants)
    if make is TokenLoss and has_sentence_head(experiment.model):
        make = PretrainingLoss
    return make(experiment.model.vocab_size, experiment.optimizer.label_smoothing, group)


def held_out_loss(experiment: Experiment, group: ProcessGroup | None) -> Loss:
    """The loss of a validation: the plain cross entropy of tokens, whatever training minimises, so that bits per byte can be compared."""
    loss = TokenLoss(experiment.model.vocab_size, 0.0, group)
    if not has_sentence_head(experiment.model):
        return loss
    return lambda logits, labels: loss(logits[0], labels[:2])


def has_sentence_head(model: AnyModel) -> bool:
    """Whether the model returns a tuple: logits of tokens, and of sentences."""
    return isinstance(model, BERT) and model.sentence_head


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
