"""Sequences of tokens through a live engine, whatever its layout: dealt to data ranks, filled up, the answers on every rank.

Every rank calls with the same sequences. Training is not disturbed (Engine.observe). A pass costs what a validation's batch costs:
with a pipeline always a whole micro-batch of seq_length tokens, for its buffers have one shape; else as many tokens as there are.
"""
# MERGED-DOC """A Scorer over a live engine: what an evaluation asks in the middle of training, answered on every rank."""
# MERGED-DOC """Texts from a live engine, at any layout: what `generate` writes from the checkpoint of the same step.
# MERGED-DOC
# MERGED-DOC There is no cache: each token costs a pass of all texts through the whole model. Good for a few texts now and then.
# MERGED-DOC """

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.config import GPT
from models.inference.sampling_params import SamplingParams
from models.inference.scoring import token_scores
from parallel.collectives import gather_from_tensor_ranks
from parallel.engines.engine import Engine, MicroBatch
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, ScoreRequest
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.settings import GenerationSettings, text_seed
from research.reliability.signals import CutShort

Ids = Sequence[int]


def always() -> bool:
    """Nobody asks to stop."""
    return True


@dataclass(frozen=True)
class Live:
    """An engine in the middle of training. Every method is collective."""

    engine: Engine
    model: GPT
    go_on: Callable[[], bool] = always
    """Asked before each pass; the same answer on every rank. False raises CutShort."""

    def room(self, length: int) -> int:
        """Sequences of so many tokens that pass at once, over all data ranks: no more tokens than in a training micro-batch."""
        settings, grid = self.engine.settings, self.engine.grid
        more = 1 if self.engine.fixed_shape else max(1, self.model.seq_length // length)
        return settings.micro_batch_size * more * grid.data

    def scores(self, sequences: Sequence[Ids]) -> list[tuple[list[float], list[bool]]]:
        """Of each sequence's tokens but the first: log p given all before it, and whether it is the likeliest. `room` of them at most.

        A sequence has 2 to seq_length + 1 tokens: the last one is not read.
        """
        shape = self._shape([ids[:-1] for ids in sequences])
        targets = self._own([ids[1:] for ids in sequences], shape).to(self.engine.device)
        group, vocab_size = self.engine.grid.tensor_group, self.model.vocab_size

        def look(logits: Tensor) -> Tensor:
            return torch.stack([found.to(torch.float32) for found in token_scores(logits, targets, group, vocab_size)])

        seen = self._observed([ids[:-1] for ids in sequences], shape, look, (2, *shape))  # data 2 b s
        seen = seen[:, :, : self._share(sequences)].transpose(1, 2).flatten(0, 1)
        return [(seen[i, 0, : len(ids) - 1].tolist(), seen[i, 1, : len(ids) - 1].bool().tolist()) for i, ids in enumerate(sequences)]

    def next_logits(self, sequences: Sequence[Ids]) -> Tensor:
        """'n v', fp32, on the CPU: after each of the sequences (1 to seq_length tokens), `room` of them at most; bits equal everywhere."""
        shape = self._shape(sequences)
        rows, lengths = self._share(sequences), [len(ids) for ids in self._dealt(sequences)]
        places = torch.tensor(lengths + [1] * (rows - len(lengths)), device=self.engine.device) - 1
        group, size = self.engine.grid.tensor_group, self.model.vocab_size

        def look(logits: Tensor) -> Tensor:
            at = logits[torch.arange(rows, device=logits.device), places]
            return gather_from_tensor_ranks(at, group)[:, :size].to(torch.float32)

        return self._observed(sequences, shape, look, (rows, size)).flatten(0, 1)[: len(sequences)]

    def _observed(self, sequences: Sequence[Ids], shape: tuple[int, int], look: Callable[[Tensor], Tensor], seen: Sequence[int]) -> Tensor:
        """'data …' on the CPU."""
        if not self.go_on():
            raise CutShort
        ids = self._own(sequences, shape)
        context = (torch.zeros(shape[0], dtype=torch.int64),) if self.model.drops else ()  # nothing is dropped, but it travels
        return self.engine.observe(MicroBatch(ids, ids, torch.zeros(shape), context), look, seen).cpu()

    def _shape(self, sequences: Sequence[Ids]) -> tuple[int, int]:
        """'b s' of a data rank's share: as little as the engine takes."""
        settings, grid = self.engine.settings, self.engine.grid
        longest = max(map(len, sequences))
        if len(sequences) > self.room(longest) or longest > self.model.seq_length:
            raise ValueError(f"{len(sequences)} sequences of up to {longest} tokens do not fit into one pass")
        if self.engine.fixed_shape:
            return settings.micro_batch_size, self.model.seq_length
        whole = -(-longest // grid.tensor) * grid.tensor if grid.sequence else longest
        return self._share(sequences), whole

    def _share(self, sequences: Sequence[Ids]) -> int:
        """Sequences of each data rank, but for the last ones, which may have fewer or none."""
        return -(-len(sequences) // self.engine.grid.data)

    def _dealt(self, sequences: Sequence[Ids]) -> Sequence[Ids]:
        """This data rank's share."""
        share = self._share(sequences)
        return sequences[self.engine.grid.data_rank * share :][:share]

    def _own(self, sequences: Sequence[Ids], shape: tuple[int, int]) -> Tensor:
        """This rank's share as a tensor of `shape`; zeros after each one's end, where no earlier token looks, and in rows without one."""
        found = torch.zeros(shape, dtype=torch.int64)
        for row, ids in zip(found, self._dealt(sequences), strict=False):
            row[: len(ids)] = torch.tensor(ids)
        return found


@dataclass(frozen=True)
class LiveScorer:
    """research/evaluation/scorer.py's Scorer. `score` is collective: every rank asks for the same and gets all answers."""

    live: Live

    @property
    def length(self) -> int:
        """seq_length, and one more: the last token is predicted, not read."""
        return self.live.model.seq_length + 1

    def score(self, asked: Sequence[ScoreRequest]) -> list[Score]:
        """Sequences of alike lengths pass together, the longest first. CutShort where somebody asked to stop."""
        left = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))  # stable: the same order on every rank
        found: dict[int, Score] = {}
        while left:
            size = self.live.room(len(asked[left[0]].ids) - 1)
            together, left = left[:size], left[size:]
            for i, (logprobs, greedy) in zip(together, self.live.scores([asked[i].ids for i in together]), strict=True):
                count = asked[i].scored
                found[i] = Score(tuple(logprobs[-count:]), tuple(greedy[-count:]))
        return [found[i] for i in range(len(asked))]


@dataclass
class LiveDecoder:
    """What research/generation/batching.py drives (its DecoderLike): rows of ids, each step the logits after all of them. Collective over all ranks.

    Logits 'n v' are fp32, on the CPU, their bits equal on every rank, so that every rank chooses the same tokens.
    """

    live: Live
    rows: list[list[int]] = field(default_factory=list)

    @property
    def free(self) -> int:
        """Rows that are not in use: as many texts at once as there are sequences in a step's micro-batches."""
        return self.live.room(self.live.model.seq_length) - len(self.rows)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """New rows behind those in use; the logits after each."""
        self.rows += [list(prompt) for prompt in prompts]
        return self.live.next_logits(self.rows[len(self.rows) - len(prompts) :])

    def step(self, ids: Sequence[int]) -> Tensor:
        """One more token for every row, in order; the logits after it."""
        for row, token in zip(self.rows, ids, strict=True):
            row.append(token)
        return self.live.next_logits(self.rows)

    def drop(self, row: int) -> None:
        """Frees a row. The last one takes its place."""
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


def write(live: Live, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, choice: SamplingParams, seed: int) -> list[GeneratedText]:
    """A finished text of at most `tokens` tokens after each prompt, as many as seq_length has room for, the same on every rank. Collective.

    Draws are those of `generate` with the same prompts in the same order and the same seed; torch's own generator is left alone.
    CutShort where somebody asked to stop; a Mistake where a prompt is too long, or the logits are not finite.
    """
    writer = TextGenerator(LiveDecoder(live), tokenizer, live.model, live.model.seq_length)
    texts = []
    for i, prompt in enumerate(prompts):
        room = writer.context - len(tokenizer.prompt(prompt))
        texts.append(writer.submit(prompt, GenerationSettings(max(1, min(tokens, room)), choice, text_seed(seed, i, 0))))
    while writer:
        writer.step()
    return texts
