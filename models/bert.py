"""BERT: the list of named layers of an encoder with a masked-language-model head, and the loss of its two heads.

With post-norm blocks it computes what transformers' BertForPreTraining does (arXiv:1810.04805), with pre-norm blocks what its
MegatronBertForPreTraining does (arXiv:1909.08053, §5.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from models.block import RESIDUALS
from models.dropout import Dropout
from models.encoder_config import BERT
from models.gpt import SAMPLES, TokenLoss
from models.recompute import recomputed
from models.registry import BuildContext
from models.segments import SEGMENTS, refuse_unsegmented
from models.token_positions import TokenPositions
from parallel.collectives import copy_to_tensor_ranks
from parallel.cross_entropy import BY_DEVICE
from parallel.grid import Grid
from parallel.layers import Layer
from parallel.linear import ReplicatedLinear
from parallel.region import region_of
from parallel.slices import Slice, make_parameter
from parallel.vocab import TiedHead, VocabParallelBias, VocabParallelEmbedding

TOKEN_TYPES = "token_types"
"""The name of the context tensor 'b s': 0 in the first sentence, 1 in the second."""
SENTENCE_LOGITS = "sentence_logits"
"""The name under which the sentence head's logits 'b 2' travel to the last layer."""


def layers(
    model: BERT,
    grid: Grid,
    seed: int,
    variants: Mapping[str, type] | None = None,
    recompute: str = "none",
    context: tuple[str, ...] = (),
) -> list[Layer]:
    """The unbuilt layers in order: those of `encoder_layers`, (sentence), masked_lm, head, head_bias, (outputs).

    Output: logits 'b s v' of this rank's vocabulary rows; with a sentence head the tuple (logits, sentence logits 'b 2', equal on every
    rank). The rest is as of `encoder_layers`.
    """
    encoder = encoder_layers(model, grid, seed, variants, recompute, context)
    return encoder + _heads(BuildContext(model, grid, seed, variants or {}, recompute), encoder[-1].context)


def encoder_layers(
    model: BERT,
    grid: Grid,
    seed: int,
    variants: Mapping[str, type] | None = None,
    recompute: str = "none",
    context: tuple[str, ...] = (),
) -> list[Layer]:
    """The unbuilt layers without the heads: embedding, token_types, position, (embedding_norm), blocks.0 …, (final_norm).

    Input: ids 'b s'. Between any two layers, and behind the last: x 'b s d', followed by the context. If the model has dropout, the
    context begins with `samples` 'b', the global sample indices. `context`: the names of what else the data bring, at most `segments`
    'b s' (models/segments.py; padding has a number of its own) and `token_types` 'b s'.
    """
    build = BuildContext(model, grid, seed, variants or {}, recompute)
    samples, segments, types = (SAMPLES if model.drops else ()), *((name,) * (name in context) for name in (SEGMENTS, TOKEN_TYPES))
    block = build.chosen("residual", RESIDUALS)
    if segments:
        refuse_unsegmented("residual", model.residual, block.forward)
    size = {"size": model.hidden_size}
    table = {"name": "embedding", "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "draw": build.init.embedding}
    position = {"name": "position", "model": model, "init": build.init, "grid": grid}
    result = [
        Layer("embedding", VocabParallelEmbedding, table | {"grid": grid}),
        Layer("token_types", TokenTypes, {"name": "token_types", "context": build}, reads=types),
        Layer("position", build.chosen("position"), position, reads=segments),
    ]
    if not block.final_norm:
        result.append(Layer("embedding_norm", build.norm, {"name": "embedding_norm", **size}))
    if model.embedding_dropout:
        dropout = {"name": "embedding", "p": model.embedding_dropout, "seed": seed, "grid": grid}
        result.append(Layer("embedding_dropout", Dropout, dropout, reads=samples))
    make_block = recomputed(block) if recompute == "full" else block
    for i in range(model.num_layers):
        make = partial(make_block, f"blocks.{i}", build)  # by position: a variant's own block may give the parameters other names
        result.append(Layer(f"blocks.{i}", make, is_block=True, reads=samples + segments))
    if block.final_norm:
        result.append(Layer("final_norm", build.norm, {"name": "final_norm", **size}))
    return [replace(layer, context=(*samples, *context)) for layer in result]


def _heads(build: BuildContext, passed: tuple[str, ...]) -> list[Layer]:
    """The layers behind the encoder. The last one drops the context."""
    model = build.model
    assert isinstance(model, BERT)
    masked = [
        Layer("masked_lm", MaskedLMTransform, {"name": "masked_lm", "context": build}),
        Layer("head", TiedHead, tied_to="embedding"),
        Layer("head_bias", VocabParallelBias, {"name": "head_bias", "vocab_size": model.vocab_size, "grid": build.grid}),
    ]
    sentence = []
    if model.sentence_head:
        head = Layer("sentence", SentenceHead, {"name": "sentence", "context": build}, context=passed, adds=(SENTENCE_LOGITS,))
        sentence, passed = [head], (*passed, SENTENCE_LOGITS)
        masked.append(Layer("outputs", BothLogits, reads=(SENTENCE_LOGITS,)))
    *others, last = (replace(layer, context=passed) for layer in masked)
    return [*sentence, *others, replace(last, drops_context=True)]


class TokenTypes(nn.Module):
    """x_t + T[type of token t] with a trained table T: 'token_types d'. Without types, every token has type 0."""

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        model, region = context.model, region_of(context.grid)
        assert isinstance(model, BERT)
        self.places, self.partial_group = TokenPositions(region), region.partial_group
        cut = Slice((model.token_types, model.hidden_size))
        self.weight = make_parameter(f"{name}.weight", context.init.embedding(f"{name}.weight", cut.shape), cut, 0, 1)

    def forward(self, x: Tensor, token_types: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; under sequence parallelism this rank's positions. token_types: 'b s', of all positions."""
        table = copy_to_tensor_ranks(self.weight, self.partial_group)
        return x + (table[0] if token_types is None else F.embedding(token_types[:, self.places.own(x)], table))


class MaskedLMTransform(nn.Module):
    """norm(gelu(x Wᵀ + b)): what the head over the vocabulary reads. Every tensor rank holds W whole, as in Megatron-LM."""

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        size, group = context.model.hidden_size, region_of(context.grid).partial_group
        self.dense = ReplicatedLinear(f"{name}.dense", size, size, context.init.inner, group)
        self.norm = context.norm(f"{name}.norm", size)

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d'."""
        return self.norm(F.gelu(self.dense(x)))


class SentenceHead(nn.Module):
    """The first token's x through a pooler, tanh(x Wᵀ + b), to the logits of the two answers to: does the second sentence follow?"""

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        size, draw = context.model.hidden_size, context.init.inner
        self.region = region_of(context.grid)
        # Every tensor rank computes the same, from the same x: no gradient is a partial sum.
        self.pooler = ReplicatedLinear(f"{name}.pooler", size, size, draw, None)
        self.classifier = ReplicatedLinear(f"{name}.classifier", size, 2, draw, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x 'b s d' -> (x, sentence logits 'b 2', equal on every tensor rank). 0: the second sentence follows; 1: it does not."""
        pooled = self.pooler(self.region.first_token(x)).tanh()
        return x, self.classifier(pooled)


class BothLogits(nn.Module):
    """The last layer of a model with two heads: puts the sentence logits back behind the logits of the vocabulary."""

    def forward(self, logits: Tensor, sentence_logits: Tensor) -> tuple[Tensor, Tensor]:
        """'b s v', 'b 2' -> both."""
        return logits, sentence_logits


@dataclass(frozen=True)
class PretrainingLoss:
    """The token loss of masked tokens plus Σ weights · cross entropy of the sentence head: a 0-dim tensor, equal on every tensor rank."""

    vocab_size: int
    label_smoothing: float
    group: ProcessGroup | None
    logits_at_once: int = BY_DEVICE

    def __call__(self, logits: tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        """logits ('b s v', 'b 2'), labels (targets 'b s', weights 'b s', sentences 'b' of 0 and 1, sentence weights 'b')."""
        of_tokens, of_sentences = logits
        targets, weights, sentences, sentence_weights = labels
        tokens = TokenLoss(self.vocab_size, self.label_smoothing, self.group, self.logits_at_once)(of_tokens, (targets, weights))
        of_sentences = of_sentences.to(torch.promote_types(of_sentences.dtype, torch.float32))
        losses = F.cross_entropy(of_sentences, sentences, reduction="none")  # b
        return tokens + (sentence_weights * losses).sum()
