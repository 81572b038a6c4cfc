"""Plain encoders (transformers' BertModel, without heads): initial values for the heads, and a certificate of the hidden states."""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import bert
from models.encoder_config import BERT
from parallel.grid import Grid
from parallel.layers import unique_parameters
from research.exchange import parity
from research.generation.restore import without_init
from research.tracking.console import Advance, counted, nothing
from research.tracking.metrics import finite

CLASSES = {"bert": "BertModel", "megatron-bert": "MegatronBertModel"}
"""Family -> transformers' class of a plain encoder."""
HiddenStates = Callable[[Tensor], Tensor]
"""ids 'b s' -> x 'b s d' behind the last block, or behind the final norm if there is one."""


@dataclass(frozen=True)
class HiddenCertificate:
    """The result of a comparison of hidden states."""

    tokens: int
    largest_difference: float
    """Of a value of a hidden state, over all tokens."""
    largest_value: float
    bound: float = parity.BOUND

    @property
    def relative(self) -> float:
        """The largest difference divided by the largest value; infinite if either is not finite."""
        return parity.relative(self.largest_difference, self.largest_value)

    @property
    def passed(self) -> bool:
        """Whether the encoders differ by rounding only."""
        return self.relative <= self.bound

    def line(self) -> str:
        """The certificate as one line for the terminal."""
        difference = f"{self.largest_difference:.1e} of {self.largest_value:.3g} = {self.relative:.1e} (bound {self.bound:.0e})"
        return f"{'passed' if self.passed else 'FAILED'} · largest difference of a hidden state {difference} · {self.tokens} tokens"

    def table(self) -> dict[str, Any]:
        """The content of certificate.json. Numbers that are not finite become strings, because JSON has none."""
        return finite(asdict(self) | {"relative": self.relative}) | {"passed": self.passed, "text": parity.TEXT, "of": "hidden states"}


@torch.no_grad()
def certify(
    ids: Tensor, theirs: Callable[[], HiddenStates], ours: Callable[[], HiddenStates], advance: Advance = nothing
) -> HiddenCertificate:
    """Compares the two encoders on ids 'b s', a window at a time. `theirs` and `ours` load one each; only one is in memory at a time."""
    load_theirs, load_ours = theirs, ours
    model = load_theirs()
    expected = [model(window[None]) for window in counted(ids, advance)]
    model = load_ours()
    actual = [model(window[None]) for window in counted(ids, advance)]
    pairs = list(zip(expected, actual, strict=True))
    differences = [float(torch.nan_to_num((x - y).abs(), nan=math.inf, posinf=math.inf).max()) for x, y in pairs]
    return HiddenCertificate(ids.numel(), max(differences), max(float(x.abs().max()) for x in expected))


def our_hidden_states(model: BERT, checkpoint: Path) -> HiddenStates:
    """Our encoder in fp32 with the weights of a checkpoint."""
    model, variants = without_init(model, {})
    return parity.read_module(bert.encoder_layers(model, Grid(), seed=0, variants=variants), checkpoint)


def initial_heads(model: BERT, names: Collection[str], seed: int) -> list[Tensor]:
    """The initial values of the parameters `names` of the heads, in this order: those that a run with this seed would draw."""
    found: dict[str, Tensor] = {}
    encoder = len(bert.encoder_layers(model, Grid(), seed))
    for layer in bert.layers(model, Grid(), seed)[encoder:]:
        if layer.tied_to is None:
            found |= {name: parameter.detach() for name, parameter in unique_parameters(layer.build())}
    return [found[name] for name in names]


def note(names: Collection[str]) -> str:
    """What an import says of heads that are not in the files."""
    heads = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return f"a plain encoder, without heads: {', '.join(heads)} have initial values, and hidden states are compared instead of logits"
