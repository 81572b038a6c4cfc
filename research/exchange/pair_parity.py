"""The parity certificate of an encoder–decoder: the logits of targets after sources, and texts that both models write, are compared."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.encoder_config import T5
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.encoder_decoder import T5Decoder
from models.segments import SEGMENTS
from parallel.grid import Grid
from parallel.layers import PlainModule
from research.exchange import parity
from research.exchange.parity import Certificate, Logits
from research.generation.sources import SourceForm
from research.tracking.console import Advance, nothing

SOURCES, TOKENS, BEAMS = 3, 16, 4
"""Both models write SOURCES greedy texts of up to TOKENS tokens, and as many by a search with BEAMS beams."""


@dataclass(frozen=True)
class PairParity:
    """Compares a T5 with transformers' model on pairs made of the certificate's text. Both are loaded twice, and one is there at a time."""

    model: T5
    form: SourceForm
    ends: tuple[int, ...]
    """The ids that end a text."""
    ids: Tensor
    """'b s': each window is a source, whose last token is replaced by `form.end`, and a target."""

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens of the source and of the target of a window."""
        window = self.ids.shape[1]
        target = min(self.model.seq_length, max(window // 2, window - self.model.source_length))
        return window - target, target

    def certify(
        self, theirs: Callable[[], nn.Module], checkpoint: Path, dtype: torch.dtype = torch.float32, advance: Advance = nothing
    ) -> Certificate:
        """Compares transformers' model, which `theirs` loads, with the checkpoint, rounded to `dtype`.

        `advance` is called with 1 for each window and model.
        """
        model = self.model.model_copy(update={"source_length": self.lengths[0]})

        def ours() -> PlainModule:
            return parity.our_model(model, checkpoint, dtype, (SEGMENTS,))

        logits = (lambda: self._their_logits(theirs()), lambda: self._our_logits(ours()))
        certificate = parity.certify(self.ids, *logits, advance, parity.OWN)
        their_texts = self._their_texts(theirs())
        our_texts = self._our_texts(T5Decoder(ours(), model, Grid(), BEAMS, TOKENS, self._start))
        equal = sum(their == our for their, our in zip(their_texts, our_texts, strict=True))
        return replace(certificate, texts=len(their_texts), equal_texts=equal)

    @property
    def _start(self) -> int:
        assert self.form.start is not None
        return self.form.start

    def _pairs(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Windows 'b s' -> sources 'b S', and what the decoder reads 'b T': the start token, and the target without its last token."""
        source, target = ids.split(self.lengths, 1)
        ends, starts = (torch.full_like(ids[:, :1], token) for token in (self.form.end, self._start))
        return torch.cat([source[:, :-1], ends], 1), torch.cat([starts, target[:, :-1]], 1)

    def _our_logits(self, module: PlainModule) -> Logits:
        """Windows 'b s' -> 'b T v'."""
        return lambda ids: module((torch.cat(self._pairs(ids), 1), torch.zeros_like(ids)))

    def _their_logits(self, module: nn.Module) -> Logits:
        """Windows 'b s' -> 'b T v'."""
        self._unscale(module)

        def logits(ids: Tensor) -> Tensor:
            source, target = self._pairs(ids)
            return module(input_ids=source, decoder_input_ids=target)[0]

        return logits

    def _unscale(self, module: Any) -> None:
        """transformers 5 takes every UMT5 for tied, whatever its files say, and scales the logits of an untied one too."""
        if module.config.model_type == "umt5" and not self.model.tied:
            module.config.tie_word_embeddings = False  # which after loading decides about the scale alone

    @property
    def _sources(self) -> list[list[int]]:
        """The sources of texts: of different lengths, the whole first and parts of it."""
        source = self._pairs(self.ids[:1])[0][0].tolist()
        return [source[i * len(source) // (2 * SOURCES) :] for i in range(SOURCES)]

    def _our_texts(self, decoder: T5Decoder) -> list[list[int]]:
        """The greedy text of each source, and the one that is best for a beam search."""
        search = BeamSearchParams(BEAMS, TOKENS, self.ends)
        best = [list(beam_search(decoder, source, search)[0].ids) for source in self._sources]
        return [*(self._greedy(decoder, source) for source in self._sources), *best]

    def _greedy(self, decoder: T5Decoder, source: list[int]) -> list[int]:
        logits, found = decoder.admit([source]), list[int]()
        while True:
            found.append(int(logits[0].argmax()))
            if found[-1] in self.ends or len(found) == TOKENS:
                decoder.clear()
                return found
            logits = decoder.step(found[-1:])

    def _their_texts(self, module: Any) -> list[list[int]]:
        """The same, by transformers' `generate`, whose cache does not work for a decoder that is deeper than its encoder."""
        import transformers

        self._unscale(module)
        found = []
        for beams in (1, BEAMS):
            settings = transformers.GenerationConfig(
                num_beams=beams, max_new_tokens=TOKENS, do_sample=False, use_cache=False, pad_token_id=self.ends[0],
                decoder_start_token_id=self._start, eos_token_id=list(self.ends),
            )  # fmt: skip
            module.generation_config = settings  # otherwise what the folder says stands in for what is not set
            for source in self._sources:
                ids = torch.tensor([source])
                with parity.quiet_transformers():
                    text = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, 1:].tolist()
                found.append(self._until_end(text))
        return found

    def _until_end(self, ids: Iterable[int]) -> list[int]:
        """The ids up to and including the first that ends the text."""
        ids = list(ids)
        before = list(takewhile(lambda token: token not in self.ends, ids))
        return ids[: len(before) + 1]
