"""The next token of each row from its logits: processed as transformers does, drawn by a number that the row alone decides.

A row's token is a function of its logits, its settings, its seed, and how many tokens it has written: of no other row, no slot,
no batch and no tensor degree, but for the rounding of its logits. That changes a sampled token where its draw lies within
rounding of an edge between two tokens, and a greedy one where the two largest logits are equal up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.inference.sampling_params import SamplingParams
from models.seed import seed_of
from parallel.errors import Mistake


@dataclass(frozen=True)
class Row:
    """What decides a row's next token beside its logits."""

    choice: SamplingParams
    seed: int
    prompt: Sequence[int]
    written: Sequence[int]
    """Ids so far."""


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """'n v' in fp32 -> the next token of each row. Rows with equal settings are processed together."""
    if all(row.choice.greedy and row.choice.repetition_penalty == 1 for row in rows):
        return logits.argmax(-1).tolist()
    found = [0] * len(rows)
    for choice in dict.fromkeys(row.choice for row in rows):
        members = [i for i, row in enumerate(rows) if row.choice == choice]
        chosen = _chosen(logits[members], choice, [rows[i] for i in members])
        for i, token in zip(members, chosen, strict=True):
            found[i] = token
    return found


def _chosen(logits: Tensor, choice: SamplingParams, rows: Sequence[Row]) -> list[int]:
    if choice.repetition_penalty != 1:
        logits = penalised(logits, [{*row.prompt, *row.written} for row in rows], choice.repetition_penalty)
    if choice.greedy:
        return logits.argmax(-1).tolist()
    return drawn(warped(logits, choice), [uniform(row.seed, len(row.written)) for row in rows])


def penalised(logits: Tensor, seen: Sequence[set[int]], penalty: float) -> Tensor:
    """'n v', the logits of each row's seen ids divided by the penalty where positive, multiplied where negative. A copy."""
    found = logits.clone()
    for row, ids in zip(found, seen, strict=True):
        at = torch.tensor(sorted(i for i in ids if i < len(row)), dtype=torch.int64, device=row.device)
        row[at] = torch.where(row[at] < 0, row[at] * penalty, row[at] / penalty)
    return found


def warped(logits: Tensor, choice: SamplingParams) -> Tensor:
    """'n v' -> 'n v': divided by the temperature, −∞ where top-k, top-p or min-p leave a token out."""
    logits = logits / choice.temperature
    if choice.top_k:
        kept = logits.topk(min(choice.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if choice.top_p < 1:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - choice.top_p
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    if choice.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < choice.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def uniform(seed: int, written: int) -> float:
    """The number in [0, 1) that draws token `written` of the text with this seed: a hash of both, of 52 bits."""
    return ((seed_of(seed, f"token {written}") >> 12) & (2**52 - 1)) / 2**52


def drawn(logits: Tensor, at: Sequence[float]) -> list[int]:
    """For each row the token in which its number falls, where tokens in the order of their ids share [0, 1) by probability."""
    ends = logits.double().softmax(-1).cumsum(-1)
    refuse_non_finite(ends[:, -1])
    numbers = torch.tensor(at, dtype=torch.float64, device=logits.device)[:, None]
    wanted = numbers * ends[:, -1:]  # less than the last end: of fp64's 53 bits a number has 52
    found = torch.searchsorted(ends, wanted, right=True)[:, 0].tolist()
    return found


def refuse_non_finite(numbers: Tensor) -> None:
    """A Mistake where the model has nothing to say."""
    if not numbers.isfinite().all():
        raise Mistake("the model's logits are not finite → use another checkpoint of its run, or precision fp32")


def log_probabilities(logits: Tensor, ids: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of each row, the model's own log-probability (before any setting) of its id, and its `top` likeliest as (id, log-probability)."""
    logp = logits.log_softmax(-1)
    own = logp.gather(1, torch.tensor(ids, device=logp.device)[:, None])[:, 0].tolist()
    best = logp.topk(min(top, logp.shape[-1]))
    pairs = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return list(zip(own, pairs, strict=True))
