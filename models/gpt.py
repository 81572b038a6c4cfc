"""GPT: the list of named layers that becomes a model or a pipeline, and the token loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroup

from models.attention import ATTENTIONS
from models.block import RESIDUALS
from models.config import GPT
from models.dropout import Dropout
from models.recompute import recomputed
from models.registry import BuildContext
from models.segments import SEGMENTS, refuse_unsegmented
from parallel.cross_entropy import BY_DEVICE, vocab_parallel_cross_entropy
from parallel.grid import Grid
from parallel.layers import Layer
from parallel.vocab import TiedHead, VocabParallelEmbedding, VocabParallelHead

SAMPLES = ("samples",)
"""The context of a model that drops: the global sample indices 'b', from which dropout masks are computed."""


def layers(
    model: GPT,
    grid: Grid,
    seed: int,
    variants: Mapping[str, type] | None = None,
    recompute: str = "none",
    context: tuple[str, ...] = (),
) -> list[Layer]:
    """The unbuilt layers in order: embedding, (position), blocks.0 …, (final_norm), head.

    Needs no process group. On a grid that has them, all ranks call it together: ranks that share a kv head get a group of their own.

    Input: ids 'b s'. Between any two layers: x 'b s d'. Output: logits 'b s v' of this rank's vocabulary rows. If the model has
    dropout, the context begins with `samples` 'b', the global sample indices. `context`: the names of what else the data bring, at most
    `segments` 'b s' (models/segments.py).
    """
    build = BuildContext(model, grid, seed, variants or {}, recompute)
    passed = (SAMPLES if model.drops else ()) + context
    block, position = build.chosen("residual", RESIDUALS), build.chosen("position")
    if SEGMENTS in context:
        refuse_unsegmented("residual", model.residual, block.forward)
        refuse_unsegmented("attention", model.attention, build.chosen("attention", ATTENTIONS).forward)
        if position.at_input:
            refuse_unsegmented("position", model.position, position.forward)
    result = [_vocabulary("embedding", VocabParallelEmbedding, build)]
    if position.at_input:
        arguments = {"name": "position", "model": model, "init": build.init, "grid": grid}
        result.append(Layer("position", position, arguments, reads=context))
    if model.embedding_dropout:
        dropout = {"name": "embedding", "p": model.embedding_dropout, "seed": seed, "grid": grid}
        result.append(Layer("embedding_dropout", Dropout, dropout, reads=SAMPLES))
    make_block = recomputed(block) if recompute == "full" else block
    for i in range(model.num_layers):
        # By position, because a block of a variant.py may give these parameters other names.
        make = partial(make_block, f"blocks.{i}", build)
        result.append(Layer(f"blocks.{i}", make, is_block=True, reads=passed))
    if block.final_norm:
        result.append(Layer("final_norm", build.norm, {"name": "final_norm", "size": model.hidden_size}))
    head = Layer("head", TiedHead, tied_to="embedding") if model.tied else _vocabulary("head", VocabParallelHead, build)
    return [replace(layer, context=passed) for layer in (*result, replace(head, drops_context=True))]


def _vocabulary(name: str, make: Callable, context: BuildContext) -> Layer:
    sizes = {"vocab_size": context.model.vocab_size, "hidden_size": context.model.hidden_size}
    return Layer(name, make, {"name": name, **sizes, "draw": context.init.embedding, "grid": context.grid})


@dataclass(frozen=True)
class TokenLoss:
    """Σ weights · cross entropy over a micro-batch: a 0-dim fp32 tensor, equal on every tensor rank.

    The weights contain the normalisation (research/data/batches.py), so that the engines' plain averages over micro-batches and
    data ranks give the exact mean over the unmasked tokens of the global batch.
    """

    vocab_size: int
    label_smoothing: float
    group: ProcessGroup | None
    logits_at_once: int = BY_DEVICE

    def __call__(self, logits: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """logits 'b s v', labels (targets 'b s', weights 'b s')."""
        targets, weights = labels
        settings = (self.group, self.vocab_size, self.label_smoothing, self.logits_at_once)
        losses = vocab_parallel_cross_entropy(logits, targets, *settings)  # b s
        return (weights * losses).sum()
