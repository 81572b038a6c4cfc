"""Sampling: the next token of each row from its logits, processed as in transformers and drawn with a stateless random number.

A row's token is a function of its logits, its settings, its seed and the number of tokens it has generated. It does not depend on
other rows, the slot, the batch or the tensor degree, except through the rounding of the logits. Rounding can change a sampled
token if its random number lies within rounding of the boundary between two tokens, and a greedy one if the two largest logits
are equal up to rounding.
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
    """What the next token of a row depends on besides its logits."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    written: Sequence[int]
    """The ids generated so far."""


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """'n v' in fp32 -> the next token of each row. Rows with equal settings are processed together."""
    if all(row.params.greedy and row.params.repetition_penalty == 1 for row in rows):
        return logits.argmax(-1).tolist()
    tokens = [0] * len(rows)
    for params in dict.fromkeys(row.params for row in rows):
        members = [i for i, row in enumerate(rows) if row.params == params]
        own_logits, own_rows = logits[members], [rows[i] for i in members]
        if params.repetition_penalty != 1:
            own_logits = penalised(own_logits, [{*row.prompt, *row.written} for row in own_rows], params.repetition_penalty)
        if params.greedy:
            chosen = own_logits.argmax(-1).tolist()
        else:
            chosen = drawn(warped(own_logits, params), [uniform(row.seed, len(row.written)) for row in own_rows])
        for i, token in zip(members, chosen, strict=True):
            tokens[i] = token
    return tokens


def penalised(logits: Tensor, seen: Sequence[set[int]], penalty: float) -> Tensor:
    """Repetition penalty: a copy of 'n v' with the logits of each row's seen ids divided by the penalty if positive, else multiplied."""
    result = logits.clone()
    for row, ids in zip(result, seen, strict=True):
        at = torch.tensor(sorted(i for i in ids if i < len(row)), dtype=torch.int64, device=row.device)
        row[at] = torch.where(row[at] < 0, row[at] * penalty, row[at] / penalty)
    return result


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """'n v' -> 'n v': divided by the temperature, and −∞ for tokens that top-k, top-p or min-p exclude."""
    logits = logits / params.temperature
    if params.top_k:
        kept = logits.topk(min(params.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if params.top_p < 1:
        ascending, order = logits.sort()
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        excluded[:, -1] = False
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    if params.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def uniform(seed: int, written: int) -> float:
    """The random number in [0, 1), of 52 bits, for token number `written` of the text with this seed: a hash of both."""
    return ((seed_of(seed, f"token {written}") >> 12) & (2**52 - 1)) / 2**52


def drawn(logits: Tensor, at: Sequence[float]) -> list[int]:
    """Inverse transform sampling: for each row the token in whose part of [0, 1) its number lies.

    The parts are as long as the probabilities and in the order of the ids.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    refuse_non_finite(cumulative[:, -1])
    numbers = torch.tensor(at, dtype=torch.float64, device=logits.device)[:, None]
    numbers = numbers * cumulative[:, -1:]  # stays below the last cumulative probability: fp64 has 53 bits, a number 52
    return torch.searchsorted(cumulative, numbers, right=True)[:, 0].tolist()


def refuse_non_finite(numbers: Tensor) -> None:
    """Raise a Mistake if the model's logits, or what was computed from them, are NaN or infinite."""
    if not numbers.isfinite().all():
        raise Mistake("the model's logits are not finite → use another checkpoint of its run, or precision fp32")


def log_probabilities(logits: Tensor, ids: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row, the log-probability of its id, and the `top` most likely tokens as (id, log-probability).

    They are the model's own: temperature and all other settings are ignored.
    """
    logp = logits.log_softmax(-1)
    of_ids = logp.gather(1, torch.tensor(ids, device=logp.device)[:, None])[:, 0].tolist()
    best = logp.topk(min(top, logp.shape[-1]))
    pairs = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return list(zip(of_ids, pairs, strict=True))
