"""Errors that one can make in composed parallelism, one function each. A test applies one inside every rank before the rank trains."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from models import attention
from models.dropout import Dropout
from models.gpt import TokenLoss
from models.init import GPT2Init
from models.norm import Norm
from models.position import Alibi
from parallel import collectives, cross_entropy, layers, linear, region, slices, vocab
from parallel.engines.engine import MicroBatch
from research.verification import training


def no_sum_on_entry() -> None:
    """The backward of f: each rank keeps the gradient of its own slice."""
    region.TensorParallelRegion.enter = lambda self, x: x


def summed_again_on_exit() -> None:
    """The backward of g is not the identity but another all-reduce."""
    doubled = collectives.conjugate(collectives.all_reduce, collectives.all_reduce)
    region.TensorParallelRegion.leave = lambda self, x: doubled(x, self.group)


def slices_unmarked() -> None:
    """Without tensor_model_parallel DeepSpeed counts a slice on one rank only: the norm, and so the clipping, is wrong."""
    make = slices.make_parameter

    def unmarked(*arguments):
        parameter = make(*arguments)
        if hasattr(parameter, "tensor_model_parallel"):
            del parameter.tensor_model_parallel
        return parameter

    linear.make_parameter = vocab.make_parameter = unmarked


def bias_before_the_sum() -> None:
    """The row bias is added on each rank, and so counted once per rank."""
    linear.RowParallelLinear.forward = lambda self, x: self.region.leave(torch.nn.functional.linear(x, self.weight, self.bias))


def norms_not_summed_over_positions() -> None:
    """Under sequence parallelism each rank keeps the norm gradient of its own positions."""
    Norm.parameters_in_use = lambda self: (self.weight, self.bias)


def row_bias_not_summed_over_positions() -> None:
    """Under sequence parallelism each rank keeps the row bias gradient of its own positions."""
    linear.copy_to_tensor_ranks = lambda x, group: x


def positions_of_rank_one_shifted() -> None:
    """On rank 1 the positions are counted from one too low."""
    first = region.SequenceParallelRegion.first_position
    region.SequenceParallelRegion.first_position = lambda self, x: max(0, first(self, x) - (self.group.rank() == 1))


def drawn_per_rank() -> None:
    """Each rank initialises its projections from a different seed."""
    draw = GPT2Init.inner

    def own(self, name, shape):
        return draw(GPT2Init(self.model, self.seed + dist.get_rank()), name, shape)

    GPT2Init.inner = own


def means_of_means() -> None:
    """Each micro-batch is averaged over its own unmasked tokens."""
    share = training.share_of

    def own_mean(experiment, step, grid, case):
        for batch in share(experiment, step, grid, case):
            mask = (batch.weights > 0).float()
            yield MicroBatch(batch.ids, batch.targets, mask / mask.sum(), batch.context)

    training.share_of = own_mean


def accumulation_forgotten() -> None:
    """Weights are not multiplied by the number of accumulated micro-batches, by which the engine then divides."""
    share = training.share_of

    def small(experiment, step, grid, case):
        for batch in share(experiment, step, grid, case):
            yield batch._replace(weights=batch.weights / case.accumulated)

    training.share_of = small


def everyone_reads_the_first_share() -> None:
    """All data ranks train on data rank 0's samples."""
    share = training.share_of

    class First:
        data_rank = 0

    training.share_of = lambda experiment, step, grid, case: share(experiment, step, First, case)


def padding_gets_probability() -> None:
    """The padded rows of the vocabulary take part in the softmax."""
    call = TokenLoss.__call__

    def padded(self, logits, labels):
        size = logits.shape[-1] * (self.group.size() if self.group else 1)
        return call(TokenLoss(size, self.label_smoothing, self.group), logits, labels)

    TokenLoss.__call__ = padded


def smoothing_over_own_rows() -> None:
    """NVIDIA/Megatron-LM#737: the smoothed mean runs over a rank's own rows of the vocabulary."""
    sums = cross_entropy._sums

    def own_rows(logits, real, highest, smoothing):
        summed, total = sums(logits, real, highest, smoothing)
        return summed, total / 2

    cross_entropy._sums = own_rows


def dropout_by_local_position() -> None:
    """The dropout mask is keyed on the position of a token on this rank, not in the sequence."""
    forward = Dropout.forward

    def local(self, x, samples):
        whole, self.region = self.region, region.TensorParallelRegion(None)
        try:
            return forward(self, x, samples)
        finally:
            self.region = whole

    Dropout.forward = local


def dropout_by_local_feature() -> None:
    """Every rank applies the same dropout mask to its own features."""
    build = Dropout.__init__

    def local(self, *arguments, **settings):
        build(self, *arguments, **settings)
        self.feature_rank = 0

    Dropout.__init__ = local


def slopes_of_the_first_heads() -> None:
    """Every rank uses the alibi slopes of rank 0's heads."""
    build = Alibi.__init__

    def first(self, name, model, init, grid):
        build(self, name, model, init, grid)
        self.grid = type(grid)()

    Alibi.__init__ = first


def tied_copies_not_summed() -> None:
    """A pipeline's first and last stage each keep the gradient of their own copy of the table."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads

    PipelineEngine._INSTRUCTION_MAP[ReduceTiedGrads] = lambda self: None


def context_lost_on_the_way() -> None:
    """The sample numbers that a block reads are not those of its batch."""
    step = layers.apply_layer

    def shifted(layer, call, passed):
        if layer.is_block and isinstance(passed, tuple):
            passed = (passed[0], *(tensor + 1 for tensor in passed[1:]))
        result = step(layer, call, passed)
        return (result[0], *(tensor - 1 for tensor in result[1:])) if layer.is_block and isinstance(result, tuple) else result

    from parallel.engines import pipeline

    pipeline.apply_layer = shifted


def shared_head_counted_twice() -> None:
    """The gradient of a kv head that several ranks use is multiplied by their number."""

    def doubled(gradient, group):
        return collectives.reduce_scatter(-1)(gradient, group) * group.size()

    attention.gather_shared = collectives.conjugate(collectives.all_gather(-1), doubled)


def shared_head_of_own_queries() -> None:
    """The gradient of a kv head that several ranks use contains the uses of one rank only."""
    attention.gather_shared = collectives.conjugate(collectives.all_gather(-1), collectives.split(-1))


def train_mutated(name: str, folder: Path) -> None:
    """The function that a rank runs: the mutation, then the training of `verify`."""
    globals()[name]()
    training.on_rank(folder)


def mutated(mutation: Callable[[], None]) -> Callable[[Path], None]:
    """The training of `verify` with one mutation."""
    return functools.partial(train_mutated, mutation.__name__)
