"""Log-likelihood scoring: TokenScorer gives the log-probabilities of given tokens, of whole texts at once and without a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from models.config import GPT, has_variants
from models.inference.variant_check import refuse_dependent_logits
from parallel.cross_entropy import vocab_parallel_argmax, vocab_parallel_cross_entropy
from parallel.grid import Grid
from parallel.layers import PlainModule

ROWS = 1024
"""The number of positions whose logits are held at once by default. Those of all positions of long texts would not fit into memory."""


class TokenScorer:
    """Scores texts with `module`, which is switched to evaluation. Collective over the grid's tensor ranks.

    The logits of at most `at_once` positions are held at a time. A Mistake is raised if classes of a variant.py let a token's logits
    depend on more than the tokens before it: its score would depend on the padding and on the other texts of the batch.
    """

    def __init__(self, module: PlainModule, model: GPT, grid: Grid, at_once: int = ROWS) -> None:
        self.module, self.model, self.grid, self.at_once = module.eval(), model, grid, at_once
        if has_variants(model):
            refuse_dependent_logits(module, model, grid, model.seq_length)

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores the last counts[i] tokens of each row of ids.

        Returns log p (at least fp32) of these tokens, row after row, and whether each is the most likely token: 'n' each, on the CPU.
        Rows have at least two tokens. Shorter rows are padded at the end, which no earlier token attends to. Logits are computed
        for the positions before scored tokens only, and stay cut over the tensor ranks.
        """
        ids, positions = padded(rows, counts)
        device = next(self.module.parameters()).device
        x = self.module.hidden(ids[:, :-1].to(device)).flatten(0, 1)[positions.to(device)]  # n d
        targets = torch.tensor([token for row, count in zip(rows, counts, strict=True) for token in row[-count:]], device=device)
        scores = []
        for part, part_targets in zip(x.split(self.at_once), targets.split(self.at_once), strict=True):
            logits = self.module.logits(part[None])  # 1 n v
            scores.append(token_scores(logits, part_targets[None], self.grid.tensor_group, self.model.vocab_size))
        logp, greedy = (torch.cat(parts, dim=1)[0].cpu() for parts in zip(*scores, strict=True))
        return logp, greedy


def token_scores(logits: Tensor, targets: Tensor, group: ProcessGroup | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """log p(target), at least fp32, and whether target is the most likely token: 'b s' each, equal on every tensor rank.

    logits: 'b s v', this rank's rows of the padded vocabulary; targets: 'b s' in [0, vocab_size). Collective over `group`: four
    all-reduces of O(b·s). Of several most likely tokens the one with the lowest id counts, as in torch.argmax.
    """
    logp = -vocab_parallel_cross_entropy(logits, targets, group, vocab_size)
    return logp, vocab_parallel_argmax(logits, group, vocab_size) == targets


def padded(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids 'b s', padded with 0, and 'n': the index into the flattened 'b (s − 1)' inputs of the position before each scored token."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    positions = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        positions.append(i * (longest - 1) + torch.arange(len(row) - 1 - count, len(row) - 1))
    return ids, torch.cat(positions)
