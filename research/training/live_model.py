"""The engine in training as a model to evaluate and to sample from, on any layout, without disturbing training (Engine.observe).

Every rank calls with the same sequences of tokens. They are dealt to the data ranks and padded, and the answers are equal on every
rank. A pass costs what a validation batch costs: with a pipeline always a whole micro-batch of seq_length tokens, so that its
buffers keep one shape; otherwise only as many tokens as there are.

`LiveScorer` is the Scorer of evaluation tasks, `LiveDecoder` the decoder behind `write`. There is no KV cache: each token of a
sample costs a pass of all texts through the whole model, which is fine for a few texts now and then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.config import GPT, has_variants
from models.inference.sampling_params import SamplingParams
from models.inference.scoring import token_scores
from models.inference.variant_check import TOLERANCE, errors_of_variants, refuse_different, shorter_lengths, trial_ids
from models.segments import SEGMENTS
from parallel.collectives import gather_from_tensor_ranks
from parallel.engines.engine import Engine
from parallel.engines.micro_batch import MicroBatch
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, ScoreRequest
from research.generation.generator import GeneratedText, TextGenerator
from research.generation.settings import GenerationSettings, text_seed
from research.reliability.signals import CutShort

Ids = Sequence[int]
LOW_PRECISION_TOLERANCE = 0.05
"""Largest allowed difference of a log-probability in bf16 and fp16, relative to the largest. `generate` and `evaluate` try in fp32."""


@dataclass(frozen=True)
class Live:
    """An engine in the middle of training. Every method is collective."""

    engine: Engine
    model: GPT
    should_continue: Callable[[], bool] = lambda: True
    """Called before each pass, with the same result on every rank. False raises CutShort."""

    def room(self, length: int) -> int:
        """How many sequences of `length` tokens pass at once, over all data ranks: no more tokens than in a training micro-batch."""
        settings, grid = self.engine.settings, self.engine.grid
        more = 1 if self.engine.fixed_shape else max(1, self.model.seq_length // length)
        return settings.micro_batch_size * more * grid.data

    def scores(self, sequences: Sequence[Ids]) -> list[tuple[list[float], list[bool]]]:
        """For each sequence, (log-probabilities, greedy flags) of its tokens but the first, each given all tokens before it.

        At most `room` sequences of 2 to seq_length + 1 tokens, of which the last is not read.
        """
        inputs = [ids[:-1] for ids in sequences]
        shape = self._shape(inputs)
        targets = self._own_rows([ids[1:] for ids in sequences], shape).to(self.engine.device)
        group, vocab_size = self.engine.grid.tensor_group, self.model.vocab_size

        def scores(logits: Tensor) -> Tensor:
            return torch.stack([values.to(torch.float32) for values in token_scores(logits, targets, group, vocab_size)])

        scored = self._observe(inputs, shape, scores, (2, *shape))  # data 2 b s
        scored = scored[:, :, : self._share(sequences)].transpose(1, 2).flatten(0, 1)
        return [(scored[i, 0, : len(ids) - 1].tolist(), scored[i, 1, : len(ids) - 1].bool().tolist()) for i, ids in enumerate(sequences)]

    def next_logits(self, sequences: Sequence[Ids]) -> Tensor:
        """The logits after each sequence: 'n v', fp32, on the CPU, bitwise equal on every rank.

        At most `room` sequences of 1 to seq_length tokens.
        """
        shape, rows = self._shape(sequences), self._share(sequences)
        lengths = [len(ids) for ids in self._own(sequences)]
        last = torch.tensor(lengths + [1] * (rows - len(lengths)), device=self.engine.device) - 1
        group, size = self.engine.grid.tensor_group, self.model.vocab_size

        def logits_at_the_end(logits: Tensor) -> Tensor:
            at_end = logits[torch.arange(rows, device=logits.device), last]
            return gather_from_tensor_ranks(at_end, group)[:, :size].to(torch.float32)

        return self._observe(sequences, shape, logits_at_the_end, (rows, size)).flatten(0, 1)[: len(sequences)]

    def refuse_dependent_logits(self) -> None:
        """A Mistake if classes of a variant.py let the logits of a token depend on later tokens or on other texts, or cannot compute one.

        Evaluations and samples pad texts, so that they would then measure the padding. A model without such classes is not tried.
        """
        if not has_variants(self.model):
            return
        # A pipeline computes every text in one shape, so its length raises nothing, and an error is that of one stage alone.
        passing = (Exception,) if self.engine.fixed_shape else (CutShort,)
        length, (ids, others) = self.model.seq_length, (trial_ids(self.model, self.model.seq_length + 1, seed) for seed in (0, 1))
        with errors_of_variants(length, *passing):
            whole = torch.tensor(self.scores([ids])[0][0])
        tolerance = TOLERANCE if self.engine.settings.precision == "fp32" else LOW_PRECISION_TOLERANCE
        for shorter in shorter_lengths(length):
            texts = [text[: shorter + 1] for text in (ids, others)][: self.room(shorter)]
            with errors_of_variants(shorter, *passing):
                found = torch.tensor(self.scores(texts)[0][0])
            refuse_different((found - whole[:shorter]).abs() / whole.abs().max(), shorter, length, tolerance)

    def _observe(
        self, sequences: Sequence[Ids], shape: tuple[int, int], function: Callable[[Tensor], Tensor], seen: Sequence[int]
    ) -> Tensor:
        """`function` of each data rank's logits: 'data …' on the CPU, where '…' is `seen`."""
        if not self.should_continue():
            raise CutShort
        ids = self._own_rows(sequences, shape)
        # nothing is dropped, and each row is one document, but both travel
        context = {"samples": torch.zeros(shape[0], dtype=torch.int64), SEGMENTS: torch.zeros(shape, dtype=torch.int64)}
        return self.engine.observe(MicroBatch(ids, (ids, torch.zeros(shape)), context), function, seen).cpu()

    def _shape(self, sequences: Sequence[Ids]) -> tuple[int, int]:
        """'b s' of a data rank's share: as small as the engine allows."""
        settings, grid = self.engine.settings, self.engine.grid
        longest = max(map(len, sequences))
        if len(sequences) > self.room(longest) or longest > self.model.seq_length:
            raise ValueError(f"{len(sequences)} sequences of up to {longest} tokens do not fit into one pass")
        if self.engine.fixed_shape:
            return settings.micro_batch_size, self.model.seq_length
        return self._share(sequences), -(-longest // grid.tensor) * grid.tensor if grid.sequence else longest

    def _share(self, sequences: Sequence[Ids]) -> int:
        """How many sequences each data rank takes; the last ranks may get fewer, or none."""
        return -(-len(sequences) // self.engine.grid.data)

    def _own(self, sequences: Sequence[Ids]) -> Sequence[Ids]:
        """This data rank's sequences."""
        share = self._share(sequences)
        return sequences[self.engine.grid.data_rank * share :][:share]

    def _own_rows(self, sequences: Sequence[Ids], shape: tuple[int, int]) -> Tensor:
        """This data rank's sequences as a tensor of `shape`, padded with zeros, which no earlier token attends to."""
        rows = torch.zeros(shape, dtype=torch.int64)
        for row, ids in zip(rows, self._own(sequences), strict=False):
            row[: len(ids)] = torch.tensor(ids)
        return rows


@dataclass(frozen=True)
class LiveScorer:
    """The Scorer of research/evaluation/scorer.py. `score` is collective: every rank passes the same requests and gets all scores."""

    live: Live

    @property
    def length(self) -> int:
        """seq_length + 1: the last token is predicted, not read."""
        return self.live.model.seq_length + 1

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Sequences of similar lengths pass together, the longest first. Raises CutShort if a rank was asked to stop."""
        left = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))  # stable: the same order on every rank
        scores: dict[int, Score] = {}
        while left:
            size = self.live.room(len(requests[left[0]].ids) - 1)
            together, left = left[:size], left[size:]
            for i, (logprobs, greedy) in zip(together, self.live.scores([requests[i].ids for i in together]), strict=True):
                count = requests[i].scored
                scores[i] = Score(tuple(logprobs[-count:]), tuple(greedy[-count:]))
        return [scores[i] for i in range(len(requests))]


@dataclass
class LiveDecoder:
    """A decoder for research/generation/batching.py without a cache: rows of ids, and after each step the logits. Collective.

    Logits 'n v' are fp32, on the CPU and bitwise equal on every rank, so every rank chooses the same tokens.
    """

    live: Live
    rows: list[list[int]] = field(default_factory=list)

    @property
    def free(self) -> int:
        """How many more texts fit: as many at once as there are sequences in one micro-batch of all data ranks."""
        return self.live.room(self.live.model.seq_length) - len(self.rows)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Adds a row for each prompt; returns the logits after each."""
        self.rows += [list(prompt) for prompt in prompts]
        return self.live.next_logits(self.rows[len(self.rows) - len(prompts) :])

    def step(self, ids: Sequence[int]) -> Tensor:
        """Appends one token to every row, in order; returns the logits after them."""
        for row, token in zip(self.rows, ids, strict=True):
            row.append(token)
        return self.live.next_logits(self.rows)

    def continued(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt."""
        return prompt

    def drop(self, row: int) -> None:
        """Frees a row. The last row takes its place."""
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


def write(live: Live, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, choice: SamplingParams, seed: int) -> list[GeneratedText]:
    """A finished text of at most `tokens` tokens after each prompt, as many as seq_length has room for; equal on every rank. Collective.

    The draws are those of `generate` with the same prompts in the same order and the same seed; torch's own generator is not used.
    Raises CutShort if a rank was asked to stop, and a Mistake if a prompt is too long or the logits are not finite.
    """
    generator = TextGenerator(LiveDecoder(live), tokenizer, live.model, live.model.seq_length)
    texts = []
    for i, prompt in enumerate(prompts):
        room = generator.context - len(tokenizer.prompt(prompt))
        texts.append(generator.submit(prompt, GenerationSettings(max(1, min(tokens, room)), choice, text_seed(seed, i, 0))))
    while generator:
        generator.step()
    return texts
