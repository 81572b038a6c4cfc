"""Beam search, the same step by step as in transformers: of all continuations, the best few are kept at every token.

The score of a beam is Σ log p / length^length_penalty over its new tokens, the end token included.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.inference.decoder import Decoder
from models.inference.sampling import penalised, refuse_non_finite

NEVER = -1e9
"""The score of what must not be chosen. The same number as in transformers, so that ties, and too few candidates, give the same result."""


@dataclass(frozen=True)
class Beam:
    """A finished continuation."""

    ids: tuple[int, ...]
    """The new tokens, including the end token if there is one."""
    score: float
    ended: bool
    """Whether the last token is an end token; False if the beam was cut off at max_new_tokens."""


@dataclass(frozen=True)
class BeamSearchParams:
    """The settings of a search, with the names and meanings of transformers."""

    beams: int
    max_new_tokens: int
    ends: Collection[int] = ()
    """Ids that end a continuation."""
    vocab_size: int = 0
    """Only ids below it are used; 0: all that the model has."""
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    """True: stop when as many beams have ended as are kept. False: stop when no running beam can do better."""


def beam_search(decoder: Decoder, prompt: Sequence[int], params: BeamSearchParams) -> list[Beam]:
    """The best `beams` continuations, best first. They use as many rows of the decoder, whose rows must all be free."""
    first = decoder.admit([prompt])
    refuse_non_finite(first)
    decoder.reorder([0] * params.beams)
    state = _State(params, first.device)
    logits = first.expand(params.beams, -1)
    while True:
        parents = state.advance(decoder.continued(prompt), logits)
        if state.over:
            break
        decoder.reorder(parents)
        logits = decoder.step([ids[-1] for ids in state.running])
    decoder.clear()

    ended = zip(state.done, state.done_scores.tolist(), strict=True)
    return [Beam(ids, score, ids[-1] in params.ends) for (ids, is_ended), score in ended if is_ended]


class _State:
    """The running beams, which are all equally long, and the best that have ended, in order of their scores."""

    def __init__(self, params: BeamSearchParams, device: torch.device) -> None:
        self.params, self.length, self.over, self.improvable = params, 0, False, True
        self.running: list[tuple[int, ...]] = [()] * params.beams
        self.scores = torch.full((params.beams,), NEVER, device=device)
        self.scores[0] = 0.0  # all beams are equal at first, so only one of them may be continued
        self.done: list[tuple[tuple[int, ...], bool]] = [((), False)] * params.beams
        """(ids, whether there is such a beam); the others fill the list up."""
        self.done_scores = torch.full((params.beams,), NEVER, device=device)

    def advance(self, prompt: Sequence[int], logits: Tensor) -> list[int]:
        """Adds one token to every beam. Returns the row that each beam continues."""
        params, self.length = self.params, self.length + 1
        logp = logits[:, : params.vocab_size or None].log_softmax(-1)
        if params.repetition_penalty != 1:
            logp = penalised(logp, [{*prompt, *ids} for ids in self.running], params.repetition_penalty)
        total = (logp + self.scores[:, None]).flatten()

        # The best candidates, enough of them that `beams` are left to continue even if the best ones all end here.
        best = total.topk(min(max(2, 1 + len(params.ends)) * params.beams, len(total)))
        parents, tokens = (best.indices // logp.shape[1]).tolist(), (best.indices % logp.shape[1]).tolist()
        sequences = [(*self.running[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        ends = [token in params.ends or self.length == params.max_new_tokens for token in tokens]
        is_end = torch.tensor(ends, device=total.device)
        self._finish(sequences, best.values, is_end)

        # The best of those that do not end here run on.
        continued = (best.values + is_end * NEVER).topk(params.beams)
        chosen = continued.indices.tolist()
        self.running, self.scores = [sequences[i] for i in chosen], continued.values

        # As in transformers, what may still come is judged by the score that the best running beam has at its current length.
        is_full = all(ended for _, ended in self.done)
        attainable = float(self.scores[0] / self.length**params.length_penalty)
        self.improvable = self.improvable and (not is_full or attainable > float(self.done_scores.min()))
        self.over = not self.improvable or (params.early_stopping and is_full) or all(ends)
        return [parents[i] for i in chosen]

    def _finish(self, sequences: list[tuple[int, ...]], scores: Tensor, is_end: Tensor) -> None:
        """Merges those of the best `beams` candidates that end here into the finished beams, of which the best are kept."""
        beams, is_full = self.params.beams, all(ended for _, ended in self.done)
        settled = self.params.early_stopping and is_full
        normalised = scores / self.length**self.params.length_penalty
        normalised = normalised + (settled + (not self.improvable)) * NEVER
        ends_here = is_end & (torch.arange(len(scores), device=scores.device) < beams)
        normalised = normalised + ~ends_here * NEVER
        best = torch.cat([self.done_scores, normalised]).topk(beams)
        candidates = [*self.done, *zip(sequences, ends_here.tolist(), strict=True)]
        self.done, self.done_scores = [candidates[i] for i in best.indices.tolist()], best.values
