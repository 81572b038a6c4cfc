"""A whole state dict as transformers writes it. The program itself writes one parameter at a time (research/exchange/exporter.py)."""

from collections.abc import Mapping

from torch import Tensor

from models.config import GPT
from models.conversion.families import FAMILIES
from models.conversion.mapping import parameter_mappings


def to_hf(model: GPT, family: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole tensors by the names in transformers' files (a tied head is not written twice): the inverse of `mapping.from_hf`."""
    tensors: dict[str, Tensor] = {}
    for parameter in parameter_mappings(model, FAMILIES[family]):
        tensors |= parameter.theirs(weights[parameter.name], model)
    return tensors
