"""Errors that one can make in an encoder, or in an encoder and a decoder, one function each, as those of mutations.py."""

import functools
from collections.abc import Callable
from pathlib import Path

from models import attention, relative_position, t5, t5_attention
from models.attention import BidirectionalAttention
from models.segments import confined
from parallel import vocab
from parallel.engines import pipeline
from research.verification import training


def cross_attention_over_own_rows() -> None:
    """Keys and values of cross attention are made of the decoder's rows."""
    forward = t5_attention.CrossAttention.forward

    def own(self, x, source, bias, samples=None):
        return forward(self, x, x[:, : source.shape[1]], bias, samples)

    t5_attention.CrossAttention.forward = own


def decoder_sees_later_rows() -> None:
    """The decoder has no causal mask."""
    relative_position.CausalRelative.hidden = relative_position.BidirectionalRelative.hidden
    t5_attention.DecoderAttention.forward = t5_attention.EncoderAttention.forward


def causal_encoder() -> None:
    """The encoder's rows see no later ones."""
    relative_position.BidirectionalRelative.hidden = relative_position.CausalRelative.hidden


def relative_bias_of_the_first_heads() -> None:
    """Every rank cuts the columns of rank 0 out of the table of relative positions."""
    make = relative_position.make_parameter
    relative_position.make_parameter = lambda name, full, cut, rank, degree: make(name, full, cut, 0, degree)


def table_counted_twice() -> None:
    """A pipeline's last stage counts its copy of the table in the gradient norm, too."""
    build = pipeline.Pipeline.__init__

    def unmarked(self, *arguments):
        build(self, *arguments)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    pipeline.Pipeline.__init__ = unmarked


def parts_cut_together() -> None:
    """Under sequence parallelism the row of source and target is cut as if it were one sequence."""
    t5.Parts.by_rank = lambda self, ids: ids


def causal_bert() -> None:
    """An encoder alone with a causal mask."""

    def masked(self, x, samples=None, segments=None):
        q, k, v = self.heads(x)
        bias = None if segments is None else confined(segments, None, q.dtype)
        return self.output(attention.rearrange(self.core(q, k, v, bias, samples), "b h s e -> b s (h e)"))

    BidirectionalAttention.forward = masked


def vocabulary_bias_of_the_first_rank() -> None:
    """Each rank adds rank 0's part of the bias of the head, once it has learned one."""
    import torch.distributed as dist

    def of_rank_0(self, logits):
        bias = self.bias.detach().clone()
        dist.broadcast(bias, 0)
        return logits + self.bias + (bias - self.bias).detach()

    vocab.VocabParallelBias.forward = of_rank_0


def train_mutated(name: str, folder: Path, hang_seconds: float = training.HANG_SECONDS) -> None:
    """The function that a rank runs: the mutation, then the training of `verify`."""
    globals()[name]()
    training.on_rank(folder, hang_seconds)


def mutated(mutation: Callable[[], None]) -> Callable[[Path], None]:
    """The training of `verify` with one mutation."""
    return functools.partial(train_mutated, mutation.__name__)
