"""How likely a model finds tokens that are given, and whether each is the one that it would have chosen; the logits stay sliced."""

from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.vocab import vocab_parallel_argmax, vocab_parallel_cross_entropy


def token_scores(logits: Tensor, targets: Tensor, group: ProcessGroup | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """log p(target), fp32 at least, and whether target is the likeliest token: 'b s' each, equal on every tensor rank.

    logits: 'b s v', this rank's rows of the padded vocabulary; targets: 'b s' in [0, vocab_size). Collective over `group`: four
    all-reduces of O(b·s). Of several likeliest tokens the one with the lowest id counts, as in torch.argmax.
    """
    logp = -vocab_parallel_cross_entropy(logits, targets, group, vocab_size)
    return logp, vocab_parallel_argmax(logits, group, vocab_size) == targets
