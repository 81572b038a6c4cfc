"""Our model as a model of lm-evaluation-harness: log-likelihoods of texts and continuations of prompts. Imports lm_eval.

The harness' TemplateLM splits contexts and continuations. Everything else follows the harness' model for transformers (HFLM):
end-of-text before a text without context, a context that is too long loses its beginning, the stop strings, and the number of tokens
left for a generated text.
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
from research.evaluation.scorer import ScoreRequest
from research.evaluation.session import Session
from research.evaluation.task import score_in_batches
from research.generation.batching import END
from research.generation.settings import GenerationSettings

DEFAULT_TOKENS = 256
"""The harness' default for tasks that set no maximum length."""
SUPPORTED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class LMEvalModel(TemplateLM):
    """The model of a Session, in one process: with several tensor ranks, rank 0 drives the others."""

    def __init__(self, session: Session, progress: Callable[[int], object] = lambda n: None) -> None:
        super().__init__()
        self.session, self.our_tokenizer, self.progress = session, session.tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        return self.our_tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Used by the harness' request caches only, which are off."""
        return self.our_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.our_tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Iterable[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives the continuation) of each ((context, continuation), ids, ids)."""
        score_requests = [self._score_request(context, following) for _, context, following in requests]
        scores = score_in_batches(score_requests, self.session.scorer, self.progress)
        return [(score.logprob, all(score.greedy)) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as the model reads."""
        score_requests, ends = [], []
        for (text,) in (request.args for request in requests):
            ids = self.our_tokenizer.encode(text)
            windows = utils.get_rolling_token_windows(ids, self.eot_token_id, self.session.length - 1, context_len=1)
            score_requests += [self._score_request(*utils.make_disjoint_window(window)) for window in windows]
            ends.append(len(score_requests))
        scores = score_in_batches(score_requests, self.session.scorer, self.progress)
        return [sum(score.logprob for score in scores[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def _score_request(self, context: list[int], following: list[int]) -> ScoreRequest:
        length = self.session.length
        if not following or len(following) >= length:
            raise Mistake(f"a text of {len(following)} tokens cannot be scored → use 1 to {length - 1} (model.seq_length)")
        return ScoreRequest(tuple([*context, *following][-length:]), len(following))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The generated texts; several are generated at once."""
        generator, texts = self.session.generator, []
        for context, options in (request.args for request in requests):
            settings = generation_settings(options, self.our_tokenizer.decode([self.eot_token_id]))
            room = generator.context - settings.max_new_tokens
            if room < 1:
                raise Mistake(
                    f"max_gen_toks = {settings.max_new_tokens} leaves no room for a prompt in {generator.context} tokens → set it to less"
                )
            prompt = self.our_tokenizer.prompt(context)[-room:]
            texts.append(generator.submit_ids(prompt, settings, (self.eot_token_id,), context))

        while generator:
            self.progress(sum(text.finish is not None for text in generator.step()))

        # decode each text at once, as HFLM does: an incomplete character at the end becomes U+FFFD, our own detokenizer leaves it out
        results = []
        for text in texts:
            ids = text.generation.ids
            decoded = self.our_tokenizer.decode(ids[:-1] if text.finish == END else ids)
            results.append(postprocess_generated_text(decoded, list(text.settings.stops), None))
        return results


def generation_settings(options: dict[str, Any], end_of_text: str) -> GenerationSettings:
    """A task's generation_kwargs as GenerationSettings. Raises a Mistake for options that are not supported."""
    normalized = normalize_gen_kwargs(copy.deepcopy(options), DEFAULT_TOKENS)
    if unknown := sorted(set(normalized) - SUPPORTED):
        raise Mistake(f"generation_kwargs {', '.join(unknown)} cannot be heeded → leave them out; known are {', '.join(sorted(SUPPORTED))}")
    stops = handle_stop_sequences(normalized.pop("until", None), eos=end_of_text)
    temperature = float(normalized.get("temperature") or 0.0) if normalized.get("do_sample") else 0.0
    others = {key: normalized[key] for key in ("top_k", "top_p", "min_p", "repetition_penalty") if key in normalized}
    sampling = SamplingParams(temperature=temperature, **others)
    return GenerationSettings(int(normalized["max_gen_toks"]), sampling, stops=tuple(filter(None, stops)))
