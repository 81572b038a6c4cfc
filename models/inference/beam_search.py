"""Beam search: of all continuations the likeliest, by keeping the best few at every token. As transformers searches, step by step.

A beam's score is Σ log p / length^length_penalty over its new tokens, the end included.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.inference.decoder import Decoder
from models.inference.sampling import penalised, refuse_non_finite

NEVER = -1e9
"""The score of what must not be chosen: transformers' own, so that ties and shortages fall out alike."""


@dataclass(frozen=True)
class Beam:
    """A finished continuation."""

    ids: tuple[int, ...]
    """The end included where it has one."""
    score: float
    ended: bool
    """Whether one of the ends came, and not only the last token allowed."""


@dataclass(frozen=True)
class Search:
    """What is searched for."""

    beams: int
    max_new_tokens: int
    ends: Collection[int] = ()
    vocab_size: int = 0
    """Only ids below it; 0: all that the model has."""
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    """Stop once as many beams have ended as are kept, instead of once none can do better."""


def search(decoder: Decoder, prompt: Sequence[int], wanted: Search) -> list[Beam]:
    """The best `beams` continuations, best first; they take as many of the decoder's rows, all of which must be free."""
    first = decoder.admit([prompt])
    refuse_non_finite(first)
    decoder.reorder([0] * wanted.beams)
    state = _State(wanted, first.device)
    logits = first.expand(wanted.beams, -1)
    while True:
        parents = state.advance(prompt, logits)
        if state.over:
            break
        decoder.reorder(parents)
        logits = decoder.step([ids[-1] for ids in state.running])
    decoder.clear()
    return state.finished()


class _State:
    """The beams under way, all equally long, and the best that have ended, in order of their scores."""

    def __init__(self, wanted: Search, device: torch.device) -> None:
        self.wanted, self.length, self.over, self.improvable = wanted, 0, False, True
        self.running: list[tuple[int, ...]] = [()] * wanted.beams
        self.scores = torch.full((wanted.beams,), NEVER, device=device)
        self.scores[0] = 0.0  # all beams are equal at first: only one of them may be continued
        self.done: list[tuple[tuple[int, ...], bool]] = [((), False)] * wanted.beams
        self.done_scores = torch.full((wanted.beams,), NEVER, device=device)

    def advance(self, prompt: Sequence[int], logits: Tensor) -> list[int]:
        """One more token; the row that each beam goes on from."""
        wanted, self.length = self.wanted, self.length + 1
        logp = logits[:, : wanted.vocab_size or None].log_softmax(-1)
        if wanted.repetition_penalty != 1:
            logp = penalised(logp, [{*prompt, *ids} for ids in self.running], wanted.repetition_penalty)
        total = (logp + self.scores[:, None]).flatten()
        kept = total.topk(min(max(2, 1 + len(wanted.ends)) * wanted.beams, len(total)))  # enough to go on where the best ones all end
        parents, tokens = (kept.indices // logp.shape[1]).tolist(), (kept.indices % logp.shape[1]).tolist()
        sequences = [(*self.running[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        hits = [token in wanted.ends or self.length == wanted.max_new_tokens for token in tokens]
        hit = torch.tensor(hits, device=total.device)
        self._finish(sequences, kept.values, hit)
        going_on = (kept.values + hit * NEVER).topk(wanted.beams)
        places = going_on.indices.tolist()
        self.running, self.scores = [sequences[i] for i in places], going_on.values
        self._judge(all(hits))
        return [parents[i] for i in places]

    def _finish(self, sequences: list[tuple[int, ...]], scores: Tensor, hit: Tensor) -> None:
        """Of the best beams, those that end now join the finished ones, of which the best stay."""
        beams, settled = self.wanted.beams, self.wanted.early_stopping and self._full
        mine = scores / self.length**self.wanted.length_penalty
        mine = mine + (settled + (not self.improvable)) * NEVER
        among_best = torch.arange(len(scores), device=scores.device) < beams
        mine = mine + ~(hit & among_best) * NEVER
        ended = (hit & among_best).tolist()
        best = torch.cat([self.done_scores, mine]).topk(beams)
        candidates = [*self.done, *zip(sequences, ended, strict=True)]
        self.done, self.done_scores = [candidates[i] for i in best.indices.tolist()], best.values

    @property
    def _full(self) -> bool:
        return all(ended for _, ended in self.done)

    def _judge(self, none_goes_on: bool) -> None:
        """Whether anything better may still come: judged, as in transformers, by the score that the best beam has at its length so far."""
        hypothetical = float(self.scores[0] / self.length**self.wanted.length_penalty)
        worst = float(self.done_scores.min())
        self.improvable = self.improvable and (not self._full or hypothetical > worst)
        self.over = not self.improvable or (self.wanted.early_stopping and self._full) or none_goes_on

    def finished(self) -> list[Beam]:
        """The best that have ended, best first."""
        found = zip(self.done, self.done_scores.tolist(), strict=True)
        return [Beam(ids, score, ids[-1] in self.wanted.ends) for (ids, ended), score in found if ended]
