"""A model that scores tokens it is given: whole texts at once, without a cache, on one rank or on tensor ranks that the first one leads."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from models.config import GPT
from parallel.cross_entropy import vocab_parallel_argmax, vocab_parallel_cross_entropy
from parallel.grid import Grid
from parallel.layers import PlainModule

ROWS = 1024
"""Places whose logits are held at once: of long texts and large vocabularies all of them would not fit."""


class TokenScorer:
    """`module` in use for scoring. Collective over the grid's tensor ranks."""

    def __init__(self, module: PlainModule, model: GPT, grid: Grid) -> None:
        self.module, self.model, self.grid = module.eval(), model, grid

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log p, fp32 at least, of the last counts[i] tokens of each row, row after row; whether each is the likeliest: 'n', on the CPU.

        Rows have two tokens or more, of which the last is not read. Shorter ones are filled up at their ends, where no earlier token
        looks; logits are made of the places before the scored tokens only, and stay sliced.
        """
        ids, places = padded(rows, counts)
        device = next(self.module.parameters()).device
        x = self.module.hidden(ids[:, :-1].to(device)).flatten(0, 1)[places.to(device)]
        targets = torch.tensor([token for row, count in zip(rows, counts, strict=True) for token in row[-count:]], device=device)
        parts = [self._of(*part) for part in zip(x.split(ROWS), targets.split(ROWS), strict=True)]
        logp, greedy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return logp, greedy

    def _of(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """x 'n d', the targets behind them 'n' -> log p and whether it is the likeliest, 'n' each."""
        logp, greedy = token_scores(self.module.logits(x[None]), targets[None], self.grid.tensor_group, self.model.vocab_size)
        return logp[0], greedy[0]


def token_scores(logits: Tensor, targets: Tensor, group: ProcessGroup | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """log p(target), fp32 at least, and whether target is the likeliest token: 'b s' each, equal on every tensor rank.

    logits: 'b s v', this rank's rows of the padded vocabulary; targets: 'b s' in [0, vocab_size). Collective over `group`: four
    all-reduces of O(b·s). Of several likeliest tokens the one with the lowest id counts, as in torch.argmax.
    """
    logp = -vocab_parallel_cross_entropy(logits, targets, group, vocab_size)
    return logp, vocab_parallel_argmax(logits, group, vocab_size) == targets


def padded(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids 'b s', 0 behind each row's end, and for each scored token the place before it in what is read, 'b (s − 1)' flattened: 'n'."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    places = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        places.append(i * (longest - 1) + torch.arange(len(row) - 1 - count, len(row) - 1))
    return ids, torch.cat(places)
