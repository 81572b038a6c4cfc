"""Errors that one can make in composed parallelism, one function each. A test applies one inside every rank before the rank trains."""

import dataclasses
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
from parallel.engines.micro_batch import MicroBatch
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
            mask = (batch.labels[1] > 0).float()
            yield MicroBatch(batch.ids, (batch.labels[0], mask / mask.sum()), batch.context)

    training.share_of = own_mean


def accumulation_forgotten() -> None:
    """Weights are not multiplied by the number of accumulated micro-batches, by which the engine then divides."""
    share = training.share_of

    def small(experiment, step, grid, case):
        for ids, (targets, weights), context in share(experiment, step, grid, case):
            yield MicroBatch(ids, (targets, weights / case.accumulated), context)

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
        return call(dataclasses.replace(self, vocab_size=size), logits, labels)

    TokenLoss.__call__ = padded


def smoothing_over_own_rows() -> None:
    """NVIDIA/Megatron-LM#737: the smoothed mean runs over a rank's own rows of the vocabulary."""
    sums = cross_entropy._sums

    def own_rows(logits, real, highest, smoothing, logits_at_once):
        summed, total = sums(logits, real, highest, smoothing, logits_at_once)
        return summed, total / 2

    cross_entropy._sums = own_rows


def dropout_by_local_position() -> None:
    """The dropout mask is keyed on the position of a token on this rank, not in the sequence."""
    forward = Dropout.forward

    def local(self, x, samples):
        whole, self.places.region = self.places.region, region.TensorParallelRegion(None)
        try:
            return forward(self, x, samples)
        finally:
            self.places.region = whole

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


def clip_forgotten() -> None:
    """The engine is told of no clip."""
    from parallel.engines import engine

    derive = engine.derive
    engine.derive = lambda settings, cuda: {**derive(settings, cuda), "gradient_clipping": 0.0}


def weight_decay_forgotten() -> None:
    """No group of parameters decays."""
    from parallel.engines import engine

    groups = engine._decay_groups
    engine._decay_groups = lambda *arguments: [{**group, "weight_decay": 0.0} for group in groups(*arguments)]


def vectors_decay_too() -> None:
    """Biases and norms decay as matrices do."""
    from parallel.engines import engine

    groups = engine._decay_groups
    engine._decay_groups = lambda parameters, settings: [
        {**group, "weight_decay": settings.weight_decay} for group in groups(parameters, settings)
    ]


def smoothing_forgotten() -> None:
    """The loss is that of the true token alone."""
    call = TokenLoss.__call__
    TokenLoss.__call__ = lambda self, logits, labels: call(dataclasses.replace(self, label_smoothing=0.0), logits, labels)


def warm_up_forgotten() -> None:
    """The learning rate begins at its peak."""
    rate = training.learning_rate
    training.learning_rate = lambda step, optimizer, *others: rate(step, optimizer.model_copy(update={"warmup_steps": 0}), *others)


def last_rows_of_the_loss_lost() -> None:
    """The forward pass of the cross entropy forgets the last block of rows, which is not a whole one."""
    sums = cross_entropy._sums

    def without_last(logits, real, highest, smoothing, logits_at_once):
        summed, total = sums(logits, real, highest, smoothing, logits_at_once)
        summed[cross_entropy._row_blocks(logits, logits_at_once)[-1]] = 1.0
        return summed, total

    cross_entropy._sums = only_with_several_blocks(without_last, sums)


def last_rows_of_the_gradient_lost() -> None:
    """The backward pass of the cross entropy forgets the last block of rows."""
    whole = cross_entropy._CrossEntropy.backward

    def without_last(ctx, gradient):
        grad, *others = whole(ctx, gradient)
        blocks = cross_entropy._row_blocks(grad, ctx.logits_at_once)
        if len(blocks) > 1:
            grad[blocks[-1]] = 0.0
        return grad, *others

    cross_entropy._CrossEntropy.backward = staticmethod(without_last)


def only_with_several_blocks(broken: Callable, whole: Callable) -> Callable:
    """`broken` where there are several blocks of rows; otherwise `whole`."""

    def either(logits, real, highest, smoothing, logits_at_once):
        several = len(cross_entropy._row_blocks(logits, logits_at_once)) > 1
        return (broken if several else whole)(logits, real, highest, smoothing, logits_at_once)

    return either


def only_the_first_bucket_reduced() -> None:
    """ZeRO-1 and 2 average the first bucket of a step over data ranks, and forget the others."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    reduce, step, reduced = DeepSpeedZeroOptimizer.buffered_reduce_fallback, DeepSpeedZeroOptimizer.step, []

    def once(self, *arguments, **settings):
        if not reduced:
            reduce(self, *arguments, **settings)
        reduced.append(True)

    def next_step(self, *arguments, **settings):
        reduced.clear()
        return step(self, *arguments, **settings)

    DeepSpeedZeroOptimizer.buffered_reduce_fallback, DeepSpeedZeroOptimizer.step = once, next_step


def only_the_first_sub_group_updated() -> None:
    """ZeRO-3 updates the first sub-group of each group of parameters, and forgets the others."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    update = DeepSpeedZeroOptimizer_Stage3._optimizer_step

    def first(self, number):
        group = self.sub_group_to_group_id
        if number == 0 or group[number] != group[number - 1]:
            update(self, number)

    DeepSpeedZeroOptimizer_Stage3._optimizer_step = first


def queries_dealt_out_in_turn() -> None:
    """Query head h attends to kv head h mod K, where its group has kv head h // (H / K)."""
    forward = attention.Core.forward

    def in_turn(self, q, k, v, bias, samples):
        times = q.shape[1] // k.shape[1]
        return forward(self, q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), bias, samples)

    attention.Core.forward = in_turn


def slopes_a_head_early() -> None:
    """The alibi slopes of a rank begin at the head with the rank's number, not at its first head."""
    from models import position

    slopes = position.alibi_slopes

    def early(heads):
        rank, own = dist.get_rank(), heads // dist.get_world_size()
        return [0.0] * (rank * own - rank) + slopes(heads)  # slice [rank · own : …] then begins at head `rank`

    position.alibi_slopes = early


def table_rows_shifted() -> None:
    """Rank 1 looks up the row before each of its own rows of the vocabulary."""
    forward = vocab.VocabParallelEmbedding.forward

    def shifted(self, ids):
        return forward(self, (ids - int(dist.get_rank() == 1)).clamp(min=0))

    vocab.VocabParallelEmbedding.forward = shifted


def rank_one_waits_for_a_message() -> None:
    """Rank 1 waits for a message that nobody sends, and so does not take part in the sum in which rank 0 waits for it."""
    leave = region.TensorParallelRegion.leave

    def wait_first(self, x):
        if dist.get_rank() == 1:
            dist.recv(torch.empty(1), src=0)
        return leave(self, x)

    region.TensorParallelRegion.leave = wait_first


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


def segments_dropped_at_a_stage_border() -> None:
    """The second stage of a pipeline takes each row for one document."""
    step = layers.apply_layer

    def dropping(layer, call, passed):
        if "segments" in layer.reads and dist.get_rank() == 1:
            place = 1 + layer.context.index("segments")
            passed = (*passed[:place], torch.zeros_like(passed[place]), *passed[place + 1 :])
        return step(layer, call, passed)

    from parallel.engines import pipeline

    pipeline.apply_layer = dropping


def shared_head_counted_twice() -> None:
    """The gradient of a kv head that several ranks use is multiplied by their number."""

    def doubled(gradient, group):
        return collectives.reduce_scatter(-1)(gradient, group) * group.size()

    attention.gather_shared = collectives.conjugate(collectives.all_gather(-1), doubled)


def shared_head_of_own_queries() -> None:
    """The gradient of a kv head that several ranks use contains the uses of one rank only."""
    attention.gather_shared = collectives.conjugate(collectives.all_gather(-1), collectives.split(-1))


def train_mutated(name: str, folder: Path, hang_seconds: float = training.HANG_SECONDS) -> None:
    """The function that a rank runs: the mutation, then the training of `verify`."""
    globals()[name]()
    training.on_rank(folder, hang_seconds)


def mutated(mutation: Callable[[], None], **settings) -> Callable[[Path], None]:
    """The training of `verify` with one mutation."""
    return functools.partial(train_mutated, mutation.__name__, **settings)
