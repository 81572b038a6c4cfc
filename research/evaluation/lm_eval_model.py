"""Our model as lm-evaluation-harness sees one: what a text's log-likelihood is, and what follows a prompt. Imports lm_eval.

Contexts and continuations are cut apart by the harness' own TemplateLM. Where its model of transformers (HFLM) decides something, so does
this one: end-of-text before a text without context, the end of what is too long, the stop strings, the tokens left for a text.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.session import Session
from research.evaluation.task import score_in_batches
from research.generation.batching import END
from research.generation.generator import GeneratedText
from research.generation.settings import GenerationSettings

USUAL_TOKENS = 256
"""The harness' own default for texts whose task does not say how long they may be."""
HEEDED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class OurModel(TemplateLM):
    """One process, whatever the number of tensor ranks: rank 0 leads the others."""

    def __init__(self, session: Session, progress: Callable[[int], object] = lambda n: None) -> None:
        super().__init__()
        self.session, self.words, self.progress = session, session.tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        """End-of-text."""
        return self.words.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """For the harness' request caches, which are not used."""
        return self.words.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """No special tokens."""
        return self.words.encode(string)

    def _loglikelihood_tokens(self, requests: Iterable[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether the continuation is what the model would have written) of ((context, continuation), ids, ids)."""
        asked = [self._asked(context, following) for _, context, following in requests]
        return [(one.logprob, all(one.greedy)) for one in self._scored(asked)]

    def _asked(self, context: list[int], following: list[int]) -> ScoreRequest:
        if not following or len(following) >= self.session.length:
            raise Mistake(f"a text of {len(following)} tokens cannot be scored → use 1 to {self.session.length - 1} (model.seq_length)")
        return ScoreRequest(tuple([*context, *following][-self.session.length :]), len(following))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as long as the model reads."""
        asked, ends = [], []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.words.encode(text), self.eot_token_id, self.session.length - 1, context_len=1)
            asked += [self._asked(*utils.make_disjoint_window(window)) for window in windows]
            ends.append(len(asked))
        scored = self._scored(asked)
        return [sum(one.logprob for one in scored[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def _scored(self, asked: list[ScoreRequest]) -> list[Score]:
        return score_in_batches(asked, self.session.scorer, self.progress)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, several written at once."""
        texts = [self._submitted(*request.args) for request in requests]
        while self.session.writer:
            done = sum(text.finish is not None for text in self.session.writer.step())
            self.progress(done)
        return [self._as_theirs(text) for text in texts]

    def _as_theirs(self, text: GeneratedText) -> str:
        """The text decoded whole, as HFLM does: where it ends within a character, U+FFFD stands for it; our own streams leave it out."""
        ids = text.written.ids
        return postprocess_generated_text(self.words.decode(ids[:-1] if text.finish == END else ids), list(text.ask.stops), None)

    def _submitted(self, context: str, settings: dict[str, Any]) -> GeneratedText:
        writer = self.session.writer
        ask = asked_for(settings, self.words.decode([self.eot_token_id]))
        room = writer.context - ask.max_new_tokens
        if room < 1:
            raise Mistake(f"max_gen_toks = {ask.max_new_tokens} leaves no room for a prompt in {writer.context} tokens → set it to less")
        return writer.submit_ids(writer.ids(context)[-room:], ask, (self.eot_token_id,), context)


def asked_for(settings: dict[str, Any], end_of_text: str) -> GenerationSettings:
    """A task's generation_kwargs as ours. A Mistake where it asks for what we do not do."""
    if unknown := sorted(set(normalize_gen_kwargs(copy.deepcopy(settings), USUAL_TOKENS)) - HEEDED):
        raise Mistake(f"generation_kwargs {', '.join(unknown)} cannot be heeded → leave them out; known are {', '.join(sorted(HEEDED))}")
    found = normalize_gen_kwargs(copy.deepcopy(settings), USUAL_TOKENS)
    stops = handle_stop_sequences(found.pop("until", None), eos=end_of_text)
    choice = {key: found[key] for key in ("top_k", "top_p", "min_p", "repetition_penalty") if key in found}
    temperature = float(found.get("temperature") or 0.0) if found.get("do_sample") else 0.0
    return GenerationSettings(
        int(found["max_gen_toks"]), SamplingParams(temperature=temperature, **choice), stops=tuple(filter(None, stops))
    )
