"""Documents packed into one row: attention is confined to each, and positions restart.

`segments` 'b s' are numbers of documents: places with equal numbers, which lie side by side, attend to each other. They travel beside x.
"""

import inspect
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from models.token_positions import TokenPositions
from parallel.errors import Mistake
from parallel.region import TensorParallelRegion

SEGMENTS = "segments"
"""The name of the context tensor; research/training/sampler.py names it too."""
PADDING = -1
"""The number of places that hold no token."""


class SegmentPositions(TokenPositions):
    """Positions 0, 1, 2, … of each segment of whole rows. Position encodings ask them; dropout asks for places in the row, as ever."""

    def __init__(self, region: TensorParallelRegion, segments: Tensor) -> None:
        super().__init__(region)
        self.positions = restarted(segments)

    def of(self, x: Tensor) -> Tensor:
        """Positions of the tokens of x 'b s d' or 'b h s e' inside a sliced region: 'b s' or 'b 1 s'."""
        return self.positions if x.dim() == 3 else self.positions[:, None]

    def of_keys(self, x: Tensor) -> Tensor:
        """Positions 'b 1 1 t' of the keys of queries x 'b h s e'."""
        return self.positions[:, None, None]

    def own(self, x: Tensor) -> Tensor:
        """Positions 'b s' of this rank's tokens x 'b s d' outside sliced regions."""
        first = self.region.first_position(x)
        return self.positions[:, first : first + x.shape[1]]

    def rows(self, table: Tensor, x: Tensor) -> Tensor:
        """The rows of a table 'seq_length d' at the positions of x 'b s d': 'b s d'."""
        return table[self.own(x)]


def restarted(segments: Tensor) -> Tensor:
    """'b s' -> 'b s' int64: how many places before each one belong to its segment."""
    places = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def confined(segments: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores 'b h s t': 'b 1 s t', or 'b h s t' with a bias 'h s t'. −∞ where the key is of another segment, or later.

    A bias has the causal mask already (models/position.py).
    """
    others = segments[:, None, :, None] != segments[:, None, None, :]  # b 1 s t
    if bias is not None:
        return bias.masked_fill(others, -torch.inf)
    length = segments.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
    return torch.zeros(others.shape, dtype=dtype, device=segments.device).masked_fill_(others | later, -torch.inf)


def visible(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention in both directions, 'b 1 s t': 0 where a key has the query's number, −∞ elsewhere.

    queries 'b s' and keys 'b t' are numbers of segments; padding has a number of its own. Every query needs a key of its number.
    """
    others = queries[:, None, :, None] != keys[:, None, None, :]
    return torch.zeros(others.shape, dtype=dtype, device=others.device).masked_fill_(others, -torch.inf)


def takes_varlen(q: Tensor) -> bool:
    """Whether torch's kernel for sequences of different lengths takes queries of this device and type. It is a flash kernel."""
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    """Causal attention within segments 'b s' without a mask 's s'. q 'b h s e', k and v 'b k s e' -> 'b h s e'. On a GPU only.

    Where segments begin is known on the device alone, so the number of segments costs one wait of the host. No GPU has run this yet.
    """
    from torch.nn.attention.varlen import varlen_attn

    length = q.shape[2]
    begins = restarted(segments).flatten() == 0
    ends = torch.tensor([begins.numel()], device=q.device)
    offsets = torch.cat([begins.nonzero().flatten(), ends]).to(torch.int32)  # waits
    q, k, v = (rearrange(x, "b h s e -> (b s) h e").contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = varlen_attn(q, k, v, offsets, offsets, length, length, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(y, Tensor)
    return rearrange(y, "(b s) h e -> b h s e", s=length)


def refuse_unsegmented(setting: str, name: str, forward: Callable[..., object]) -> None:
    """Raises a Mistake if the `forward` of a class of variant.py does not take segments: it would attend to other documents."""
    parameters = inspect.signature(forward).parameters
    if SEGMENTS not in parameters and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        raise Mistake(
            f"model.{setting} = {name!r}: its forward takes no {SEGMENTS}, which data.examples needs → add {SEGMENTS}=None behind samples "
            "and hand it on to attention, or use data.examples = 'stream'"
        )
