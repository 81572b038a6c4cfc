"""Texts from a live engine, at any layout: what `generate` writes from the checkpoint of the same step.

There is no cache: each token costs a pass of all texts through the whole model. Good for a few texts now and then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.choice import Choice
from research.ask import Ask, text_seed
from research.data.tokenizer import Tokenizer
from research.live import Live
from research.writer import Text, Writer


@dataclass
class LiveDecoder:
    """What research/batch.py drives (its Writes): rows of ids, each step the logits after all of them. Collective over all ranks.

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


def write(live: Live, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, choice: Choice, seed: int) -> list[Text]:
    """A finished text of at most `tokens` tokens after each prompt, as many as seq_length has room for, the same on every rank. Collective.

    Draws are those of `generate` with the same prompts in the same order and the same seed; torch's own generator is left alone.
    CutShort where somebody asked to stop; a Mistake where a prompt is too long, or the logits are not finite.
    """
    writer = Writer(LiveDecoder(live), tokenizer, live.model, live.model.seq_length)
    texts = []
    for i, prompt in enumerate(prompts):
        room = writer.context - len(writer.ids(prompt))
        texts.append(writer.submit(prompt, Ask(max(1, min(tokens, room)), choice, text_seed(seed, i, 0))))
    while writer:
        writer.step()
    return texts
