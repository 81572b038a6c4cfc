"""A model of classes that a cache does not decode is decoded without one, token for token like whole passes, or refused in words."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import GPT
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.decoder import Decoder
from models.inference.sampling import Row, next_tokens
from models.inference.sampling_params import GREEDY
from models.inference.scoring import TokenScorer
from models.inference.sequences import CachedSequences
from models.inference.variant_check import ROWS, errors_of_variants, why_uncached
from parallel.errors import Mistake
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers import decoding
from tests.models.helpers.build import ALONE, ROTARY
from tests.models.helpers.decoding import DRAWN, LENGTH, PROMPTS, filled, logits_of, longer, written
from tests.models.helpers.undecodable import REFUSED, UNCACHED, WINDOW, NeedsFourBlock, WindowBlock
from tests.models.helpers.variants import SandwichBlock

WINDOWED = longer(residual="variant:WindowBlock", num_kv_heads=2, position="rotary")
VARIANTS: dict[str, type] = {"WindowBlock": WindowBlock}


def model_of(setting: str, own: type) -> tuple[GPT, dict[str, type]]:
    """A model of one class of a variant.py, with rotary's settings for a position class."""
    return longer(**(ROTARY if setting == "position" else {}) | {setting: f"variant:{own.__name__}"}), {own.__name__: own}


def by_whole_passes(module: PlainModule, model: GPT, prompt: list[int], tokens: int, choice, seed: int) -> list[int]:
    """The independent truth: for every token a pass over the text so far, alone."""
    ids: list[int] = []
    for _ in range(tokens):
        ids += next_tokens(logits_of(module, model, [*prompt, *ids])[None], [Row(choice, seed, prompt, ids)])
    return ids


class WholePasses:
    """The methods of a decoder that a beam search calls, by one pass per text."""

    def __init__(self, module: PlainModule, model: GPT) -> None:
        self.module, self.model, self.texts = module, model, list[list[int]]()

    def admit(self, prompts):
        self.texts += map(list, prompts)
        return torch.stack([logits_of(self.module, self.model, text) for text in self.texts])

    def step(self, ids):
        self.texts = [[*text, token] for text, token in zip(self.texts, ids, strict=True)]
        return torch.stack([logits_of(self.module, self.model, text) for text in self.texts])

    def continued(self, prompt):
        return prompt

    def reorder(self, parents):
        self.texts = [self.texts[parent] for parent in parents]

    def clear(self):
        self.texts = []


REASONS = {
    "WindowBlock": f"(token {WINDOW + 1} of {LENGTH} is off by 0.",
    "OwnAttentionBlock": f"(token 2 of {LENGTH} is off by ",
    "Counts": f"(token 2 of {LENGTH} is off by ",
    "OwnTable": f"(token 2 of {LENGTH} is off by ",
    "WholeLength": "one token at a time (ValueError: a table of 9 places does not fit)",
}


@pytest.mark.parametrize(("setting", "own"), [(setting, own) for setting, classes in UNCACHED.items() for own in classes])
def test_what_a_cache_does_not_decode_is_decoded_without_one(setting, own):
    """The tokens of four prompts together are those of whole passes. A line says why: the first token that differs, or the error."""
    model, variants = model_of(setting, own)
    alone, decoder = filled(model, variants=variants), Decoder(filled(model, variants=variants), model, ALONE, len(PROMPTS), LENGTH)
    assert decoder.uncached and decoder.uncached.startswith("no KV cache, so each token costs a pass over the whole text: classes of")
    assert REASONS[own.__name__] in decoder.uncached and decoder.cache_bytes == 0
    for choice in (GREEDY, DRAWN) if own is WindowBlock else (GREEDY,):
        expected = [by_whole_passes(alone, model, prompt, 14, choice, 10 + k) for k, prompt in enumerate(PROMPTS)]
        assert written(decoder, PROMPTS, 14, choice) == expected
        assert any(len(set(text)) > 1 for text in expected), "texts that repeat one token compare little"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_position_of_the_context_is_tried(dtype):
    """A window of WINDOW tokens is not noticed in a context as long, and is in one that is longer by one, in any precision."""
    module = filled(WINDOWED, dtype=dtype, variants=VARIANTS)
    before = [parameter.clone() for parameter in module.parameters()]
    assert why_uncached(module, WINDOWED, ALONE, WINDOW) is None
    assert f"(token {WINDOW + 1} of {WINDOW + 1} is" in (why_uncached(module, WINDOWED, ALONE, WINDOW + 1) or "")
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_a_trial_takes_an_eighth_of_the_context_s_steps_and_frees_its_cache(slots, monkeypatch):
    """Whatever the number of slots is. Of the caches that were made, only the decoder's own is left, without a garbage collection."""
    steps, caches = [], []
    step, create = CachedSequences.step, CachedSequences.__init__

    def counted(self, ids):
        steps.append(len(ids))
        return step(self, ids)

    def noted(self, *arguments):
        create(self, *arguments)
        caches.extend((core.rows.slots, weakref.ref(core.keys)) for core in self.cores)

    monkeypatch.setattr(CachedSequences, "step", counted), monkeypatch.setattr(CachedSequences, "__init__", noted)
    model = longer(residual="variant:SandwichBlock")
    gc.disable()
    try:
        decoder = Decoder(filled(model, variants={"SandwichBlock": SandwichBlock}), model, ALONE, slots, LENGTH)
        left = [rows for rows, keys in caches if keys() is not None]
    finally:
        gc.enable()
    assert decoder.uncached is None and left == [slots] * model.num_layers and len(caches) == 2 * model.num_layers
    assert len(steps) <= -(-(LENGTH - 1) // ROWS) and sum(steps) == LENGTH - 1


def test_each_tensor_returns_in_its_own_precision():
    """A bf16 model with a buffer in fp64, one in fp16 and one of integers, as classes of a variant.py may have."""
    module = filled(WINDOWED, dtype=torch.bfloat16, variants=VARIANTS)
    own = {"in_fp64": torch.rand(3, dtype=torch.float64), "in_fp16": torch.rand(3).half(), "in_int64": torch.arange(3)}
    for name, tensor in own.items():
        module.register_buffer(name, tensor.clone())
    assert why_uncached(module, WINDOWED, ALONE, WINDOW) is None
    for name, tensor in own.items():
        found = module.get_buffer(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def test_the_window_of_the_page_keeps_its_cache():
    """The class in docs/generating.md, a position scheme, is decoded with the cache: the tokens are those of whole passes."""
    page = (Path(__file__).parents[3] / "docs" / "generating.md").read_text(encoding="utf-8")
    classes: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], classes)
    classes["WINDOW"] = WINDOW
    model, variants = model_of("position", classes["SlidingWindow"])
    decoder = Decoder(filled(model, variants=variants), model, ALONE, len(PROMPTS), LENGTH)
    assert decoder.uncached is None and decoder.cache_bytes
    same = longer(**ROTARY, residual="variant:WindowBlock")  # the same model with the window in the core of attention
    alone = filled(same, variants=VARIANTS)
    expected = [by_whole_passes(alone, same, prompt, 14, GREEDY, 0) for prompt in PROMPTS]
    assert written(decoder, PROMPTS, 14) == expected
    classes["WINDOW"] = LENGTH
    assert written(decoder, PROMPTS, 14) != expected


@pytest.mark.parametrize("kind", [Decoder, TokenScorer])
@pytest.mark.parametrize(("setting", "own"), [(setting, own) for setting, classes in REFUSED.items() for own in classes])
def test_logits_that_are_not_causal_are_refused(setting, own, kind):
    model, variants = model_of(setting, own)
    with pytest.raises(Mistake, match=r"token \d+ of a text gets other logits among 24 tokens .* → let classes of variant.py depend only"):
        kind(filled(model, variants=variants), model, ALONE, *(() if kind is TokenScorer else (2, LENGTH)))


@pytest.mark.parametrize("kind", [Decoder, TokenScorer])
def test_a_class_that_cannot_compute_a_short_text_is_refused(kind):
    model, variants = model_of("residual", NeedsFourBlock)
    with pytest.raises(Mistake) as refused:
        kind(filled(model, variants=variants), model, ALONE, *(() if kind is TokenScorer else (2, LENGTH)))
    said = "classes of variant.py cannot compute a text of 1 token (ValueError: 1 tokens are fewer than 4) → let them take texts of every"
    assert str(refused.value).startswith(said)


def test_running_out_of_memory_is_not_a_variants_mistake():
    with pytest.raises(torch.OutOfMemoryError), errors_of_variants(1):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("own", [WindowBlock, SandwichBlock], ids=lambda own: own.__name__)
def test_bf16_is_decoded_as_whole_passes_in_bf16_compute_it(own):
    """Without a cache and with one, to 5 % of the largest logit. The module is back in its precision after the checks."""
    model, variants = model_of("residual", own)
    alone, module = (filled(model, dtype=torch.bfloat16, variants=variants) for _ in range(2))
    decoder = Decoder(module, model, ALONE, 1, LENGTH)
    assert bool(decoder.uncached) == (own is WindowBlock) and next(module.parameters()).dtype == torch.bfloat16
    text = list(range(5, 5 + WINDOW + 4))
    decoder.admit([text[:1]])
    for i, token in enumerate(text[1:], start=2):
        found, expected = decoder.step([token])[0], logits_of(alone, model, text[:i])
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_windowed_model_is_scored():
    """Log-probabilities in a padded batch are those of whole passes, to 1e-5."""
    texts = [*PROMPTS[1:], list(range(LENGTH))]
    alone, scorer = filled(WINDOWED, variants=VARIANTS), TokenScorer(filled(WINDOWED, variants=VARIANTS), WINDOWED, ALONE)
    logp, _ = scorer.score(texts, [1] * len(texts))
    for text, found in zip(texts, logp, strict=True):
        assert abs(float(logits_of(alone, WINDOWED, text[:-1]).log_softmax(-1)[text[-1]] - found)) < 1e-5


def test_beams_without_a_cache_are_those_of_whole_passes():
    module, decoder = filled(WINDOWED, variants=VARIANTS), Decoder(filled(WINDOWED, variants=VARIANTS), WINDOWED, ALONE, 3, LENGTH)
    params = BeamSearchParams(3, 12, (3, 9))
    found, expected = beam_search(decoder, PROMPTS[1], params), beam_search(WholePasses(module, WINDOWED), PROMPTS[1], params)  # type: ignore[arg-type]
    assert decoder.uncached and [beam.ids for beam in found] == [beam.ids for beam in expected]
    assert [beam.score for beam in found] == pytest.approx([beam.score for beam in expected], abs=1e-5)


def test_tensor_ranks_decode_without_a_cache_what_one_rank_decodes():
    """Every call of the driver, on two ranks: logits to 1e-5, beams equal."""
    first, other = run_ranks(decoding.carried_out_by_driver, 2, WINDOWED, VARIANTS)
    decoder = Decoder(filled(WINDOWED, variants=VARIANTS), WINDOWED, ALONE, 4, LENGTH)
    alone = decoding.carried_out(decoder)
    assert other is None and decoder.uncached
    assert [beam[0] for beam in first["beams"]] == [beam[0] for beam in alone["beams"]]
    for found, expected in zip(first["logits"], alone["logits"], strict=True):
        assert abs(found - expected).max() <= 1e-5 * abs(expected).max()
