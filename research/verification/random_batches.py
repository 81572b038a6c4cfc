"""The batches on which `verify` trains: random ids with all that the experiment's kind of model reads beside them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.bert import TOKEN_TYPES
from models.encoder_config import BERT, T5, AnyModel
from models.segments import PADDING, SEGMENTS
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid
from research.config import Experiment
from research.verification.layouts import BATCH, LayoutCase


def batch_of(experiment: Experiment, step: int) -> MicroBatch:
    """The global batch of a step: random tokens. In its second half every third token is masked.

    So the mean over all tokens differs from the mean of the micro-batches' means. In every second step the tokens are the first few of
    the vocabulary, which makes the gradient longer. It holds all that may travel beside x; layers read what they are built for.
    """
    model = experiment.model
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, model.seq_length + 1), generator=generator)
    mask = torch.ones(BATCH, model.seq_length)
    mask[BATCH // 2 :, ::3] = 0
    samples = step * BATCH + torch.arange(BATCH)
    # documents of 1 to 7 tokens, which packed samples confine attention to; others do not read them
    segments = (torch.rand(BATCH, model.seq_length, generator=generator) < 0.3).cumsum(1)
    ids = tokens[:, :-1]
    if isinstance(model, T5):
        source = torch.randint(0, model.vocab_size, (BATCH, model.source_length), generator=generator)
        ids, segments = torch.cat([source, ids], dim=1), segments_of_pairs(model, BATCH, generator)
    if step % 2:
        ids, tokens = ids % 5, tokens % 5
    labels = (tokens[:, 1:], mask / mask.sum(), *sentences_of(model, BATCH))
    types = (torch.arange(model.seq_length) >= model.seq_length // 3).long().expand(BATCH, -1)
    return MicroBatch(ids, labels, {"samples": samples, SEGMENTS: segments, TOKEN_TYPES: types})


def segments_of_pairs(model: T5, rows: int, generator: torch.Generator) -> Tensor:
    """'b (S+T)': two pairs in each row, whose sides end at random places, and padding behind them."""
    sides = []
    for length in (model.source_length, model.seq_length):
        ends = torch.randint(1, length // 2 + 1, (2, rows, 1), generator=generator)
        places = torch.arange(length).expand(rows, -1)
        sides.append(torch.where(places < ends[0], 0, torch.where(places < ends[0] + ends[1], 1, PADDING)))
    return torch.cat(sides, dim=1)


def sentences_of(model: AnyModel, rows: int) -> tuple[Tensor, ...]:
    """The labels of a sentence head, and their weights; none without one."""
    if not (isinstance(model, BERT) and model.sentence_head):
        return ()
    return torch.arange(rows) % 3 % 2, torch.full((rows,), 1 / rows)


def share_of(experiment: Experiment, step: int, grid: Grid, case: LayoutCase) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, with weights for engines that average over micro-batches and data ranks."""
    whole, micro = batch_of(experiment, step), case.micro_batch
    for i in range(case.accumulated):
        first = (grid.data_rank * case.accumulated + i) * micro
        rows = slice(first, first + micro)
        shares = [label[rows] for label in whole.labels]  # targets and their weights take turns
        labels = tuple(share * case.accumulated * case.data if j % 2 else share for j, share in enumerate(shares))
        yield MicroBatch(whole.ids[rows], labels, {name: tensor[rows] for name, tensor in whole.context.items()})
