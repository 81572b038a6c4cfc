"""T5: the list of named layers of an encoder and a decoder. It computes what transformers' UMT5ForConditionalGeneration does.

One tensor travels between the layers: x 'b (S+T) d', the S rows of the encoder followed by the T rows of the decoder. The encoder's
layers pass the decoder's rows on, and the decoder's layers the encoder's, which they attend to. So a pipeline may be cut anywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.block import Block, PreNormBlock
from models.dropout import Dropout
from models.encoder_config import T5
from models.gpt import SAMPLES
from models.init import T5_INITS
from models.norm import RMSNorm
from models.recompute import recomputed
from models.registry import BuildContext
from models.relative_position import BidirectionalRelative, CausalRelative
from models.segments import SEGMENTS
from models.t5_attention import CrossAttention, DecoderAttention, EncoderAttention, visible_sources
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import Layer
from parallel.linear import Draw
from parallel.region import region_of
from parallel.vocab import TiedHead, VocabParallelEmbedding, VocabParallelHead


def layers(
    model: T5,
    grid: Grid,
    seed: int,
    variants: Mapping[str, type] | None = None,
    recompute: str = "none",
    context: tuple[str, ...] = (),
) -> list[Layer]:
    """The unbuilt layers in order: embedding, (embedding_dropout), encoder.blocks.0 …, encoder.final_norm, decoder.blocks.0 …,
    decoder.final_norm, head.

    Input: ids 'b (S+T)', S = source_length tokens of a source followed by the T = seq_length tokens that the decoder reads. Between any
    two layers: x 'b (S+T) d', under sequence parallelism this rank's 'b (S/tp + T/tp) d'. Output: logits 'b T v' of this rank's
    vocabulary rows. If the model has dropout, the context begins with `samples` 'b', the global sample indices. `context` must name
    `segments` 'b (S+T)': the numbers of the pairs that are packed in a row. Rows of a source attend to each other where their numbers
    are equal, rows of a target to earlier ones and to the source of their number. Padding has the number −1.
    """
    if SEGMENTS not in context:
        raise ValueError(f"a T5 reads {SEGMENTS}, which are not among the context {context}")
    parts = Parts(model.source_length, grid.tensor if grid.sequence else 1)
    refuse_uneven_parts(model, parts)
    settings = (model, grid, seed, variants or {}, recompute)
    encoder, decoder = EncoderContext(*settings), DecoderContext(*settings)
    read = SAMPLES if model.drops else ()
    sizes = {"vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "grid": grid}
    embedding = {"name": "embedding", **sizes, "draw": encoder.init.embedding, "parts": parts}
    result = [Layer("embedding", SourceTargetEmbedding, embedding)]
    if model.embedding_dropout:
        result.append(Layer("embedding_dropout", EmbeddingDropout, {"context": encoder, "parts": parts}, reads=SAMPLES))
    result += _stack("encoder", EncoderBlock, model.num_encoder_layers, encoder, parts)
    result.append(Layer("encoder.final_norm", EncoderNorm, {"name": "encoder.final_norm", "context": encoder, "parts": parts}, reads=read))
    result += _stack("decoder", DecoderBlock, model.num_layers, decoder, parts)
    result.append(Layer("decoder.final_norm", DecoderNorm, {"name": "decoder.final_norm", "context": decoder, "parts": parts}, reads=read))
    untied = Layer("head", VocabParallelHead, {"name": "head", **sizes, "draw": decoder.init.inner})
    head = Layer("head", ScaledTiedHead, tied_to="embedding") if model.tied else untied
    passed = (*read, *context)
    return [replace(layer, context=passed) for layer in (*result, replace(head, drops_context=True))]


def _stack(name: str, block: Callable[..., nn.Module], number: int, context: BuildContext, parts: "Parts") -> list[Layer]:
    """The blocks of the encoder or of the decoder."""
    make, read = recomputed(block) if context.recompute == "full" else block, SAMPLES if context.model.drops else ()
    blocks = []
    for i in range(number):
        make_one = partial(make, f"{name}.blocks.{i}", context, parts)
        blocks.append(Layer(f"{name}.blocks.{i}", make_one, is_block=True, reads=(*read, SEGMENTS)))
    return blocks


@dataclass(frozen=True)
class Parts:
    """Where a row's source ends and its target begins. Under sequence parallelism each of the two is cut by itself over `ranks` ranks."""

    source_length: int
    ranks: int = 1

    def whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What every rank holds whole, 'b (S+T)' -> 'b S', 'b T'."""
        return x[:, : self.source_length], x[:, self.source_length :]

    def own(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows outside sliced regions, 'b (S/ranks + T/ranks) d' -> 'b S/ranks d', 'b T/ranks d'."""
        rows = self.source_length // self.ranks
        return x[:, :rows], x[:, rows:]

    def by_rank(self, ids: Tensor) -> Tensor:
        """'b (S+T)' in the order in which ranks hold them: rank 0's piece of the source and of the target, then rank 1's, and so on."""
        pieces = [rearrange(part, "b (ranks n) -> b ranks n", ranks=self.ranks) for part in self.whole(ids)]
        return torch.cat(pieces, dim=2).flatten(1)


def refuse_uneven_parts(model: T5, parts: Parts) -> None:
    """A Mistake if the ranks that cut along the sequence do not divide both parts."""
    for name, length in (("source_length", model.source_length), ("seq_length", model.seq_length)):
        if length % parts.ranks:
            raise Mistake(
                f"parallel.sequence with parallel.tensor = {parts.ranks} does not divide model.{name} = {length} → "
                f"use a multiple of {parts.ranks}, or parallel.sequence = False"
            )


class StackContext(BuildContext):
    """What the layers of one of the two stacks are built with: attention and positions are those of the stack."""

    own: Mapping[str, Mapping[str, Any]]

    def chosen(self, setting: str, registered: Mapping[str, Any] | None = None) -> Any:
        """The class that `model.<setting>` names: a variant, or a class of this stack, or of `registered`."""
        return super().chosen(setting, self.own.get(setting, registered))


class EncoderContext(StackContext):
    """The encoder's."""

    own = {"init": T5_INITS, "attention": {"softmax": EncoderAttention}, "position": {"relative": BidirectionalRelative}}


class DecoderContext(StackContext):
    """The decoder's."""

    own = {"init": T5_INITS, "attention": {"softmax": DecoderAttention}, "position": {"relative": CausalRelative}}


class SourceTargetEmbedding(VocabParallelEmbedding):
    """One table for the source, the target and, if tied, the head. ids: 'b (S+T)' -> 'b (S+T) d', cut part by part."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, draw: Draw, grid: Grid, parts: Parts) -> None:
        super().__init__(name, vocab_size, hidden_size, draw, grid)
        self.parts = parts

    def forward(self, ids: Tensor) -> Tensor:
        """'b (S+T)' -> 'b (S+T) d'; under sequence parallelism this rank's piece of either part."""
        return super().forward(ids if self.parts.ranks == 1 else self.parts.by_rank(ids))

    def logits(self, x: Tensor) -> Tensor:
        """'b T d' -> 'b T v': the tied head in a pipeline, whose last stage has a copy of the table."""
        return super().logits(x * x.shape[-1] ** -0.5)


class ScaledTiedHead(TiedHead):
    """logits = (x/√d) Wᵀ with the embedding's W (arXiv:1910.10683's code, T5 1.0)."""

    def forward(self, x: Tensor) -> Tensor:
        """'b T d' -> 'b T v'."""
        return super().forward(x * x.shape[-1] ** -0.5)


class EmbeddingDropout(nn.Module):
    """Dropout of what enters the first block of either stack, with a mask of its own for each. 'b (S+T) d' -> 'b (S+T) d'."""

    def __init__(self, context: BuildContext, parts: Parts) -> None:
        super().__init__()
        self.parts, settings = parts, (context.model.embedding_dropout, context.seed, context.grid)
        self.source, self.target = (Dropout(f"{stack}.embedding", *settings) for stack in ("encoder", "decoder"))

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        source, target = self.parts.own(x)
        return torch.cat([self.source(source, samples), self.target(target, samples)], dim=1)


class _StackNorm(RMSNorm):
    """RMSNorm of the rows of one stack, followed by dropout."""

    def __init__(self, name: str, context: BuildContext, parts: Parts) -> None:
        model = context.model
        super().__init__(name, model.hidden_size, model, region_of(context.grid).partial_group)
        self.parts, self.dropout = parts, Dropout(name, model.embedding_dropout, context.seed, context.grid)


class EncoderNorm(_StackNorm):
    """Normalises the encoder's rows, and passes the decoder's on. 'b (S+T) d' -> 'b (S+T) d'."""

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        source, target = self.parts.own(x)
        return torch.cat([self.finish(source, samples), target], dim=1)

    def finish(self, source: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b S d' -> 'b S d': what the decoder attends to."""
        return self.dropout(super().forward(source), samples)


class DecoderNorm(_StackNorm):
    """Drops the encoder's rows, and normalises the decoder's. 'b (S+T) d' -> 'b T d'."""

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        return self.finish(self.parts.own(x)[1], samples)

    def finish(self, target: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b T d' -> 'b T d': what the head reads."""
        return self.dropout(super().forward(target), samples)


class EncoderBlock(PreNormBlock):
    """A pre-norm block on the encoder's rows of x 'b (S+T) d'; the decoder's rows are passed on."""

    def __init__(self, name: str, context: BuildContext, parts: Parts) -> None:
        super().__init__(name, context)
        self.parts = parts

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b (S+T) d', segments 'b (S+T)' -> 'b (S+T) d'."""
        assert segments is not None
        source, target = self.parts.own(x)
        return torch.cat([self.encode(source, samples, self.parts.whole(segments)[0]), target], dim=1)

    def encode(self, source: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b S d', segments 'b S' -> 'b S d'."""
        return super().forward(source, samples, segments)


class DecoderBlock(Block):
    """A pre-norm block with cross attention on the decoder's rows of x 'b (S+T) d'; the encoder's rows are attended to and passed on."""

    def __init__(self, name: str, context: BuildContext, parts: Parts) -> None:
        super().__init__(name, context)
        self.parts = parts
        self.cross_norm = context.norm(f"{name}.cross_norm", context.model.hidden_size)
        self.cross_attention = CrossAttention(f"{name}.cross_attention", context)
        self.cross_dropout = Dropout(f"{name}.cross_attention.residual", context.model.residual_dropout, context.seed, context.grid)

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b (S+T) d', segments 'b (S+T)' -> 'b (S+T) d'."""
        assert segments is not None
        (source, target), (of_source, of_target) = self.parts.own(x), self.parts.whole(segments)
        bias = visible_sources(of_target, of_source, x.dtype)
        return torch.cat([source, self.decode(target, source, bias, samples, of_target)], dim=1)

    def decode(
        self, x: Tensor, source: Tensor | None, bias: Tensor, samples: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """x 'b T d', source 'b S d', bias 'b 1 T S' for cross attention, segments 'b T' -> 'b T d'.

        source: None where a cache holds it (models/inference/encoder_decoder.py).
        """
        x = x + self.attend(self.attention_norm(x), samples, segments)
        x = x + self.cross_dropout(self.cross_attention(self.cross_norm(x), source, bias, samples), samples)
        return x + self.feed_forward(self.mlp_norm(x), samples)
