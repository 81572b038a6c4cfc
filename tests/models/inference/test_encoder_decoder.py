"""A T5 writes what transformers' UMT5 writes, greedily and with beams, together and alone, on one tensor rank and on two."""

import functools
import itertools
import math

import pytest
import torch
from transformers import GenerationConfig

from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.encoder_decoder import T5Decoder
from models.inference.sampling_params import GREEDY, SamplingParams
from models.inference.variant_check import UnusableLogits
from tests.harness import run_ranks
from tests.models.helpers import t5
from tests.models.helpers.build import ALONE, relative
from tests.models.helpers.decoding import written
from tests.models.helpers.t5_decoding import BEAMS, LENGTH, SOURCES, START, decoder, on_tensor_ranks, weights

END, TOKENS = 1, LENGTH - 2
SHAPES = {
    "tied": t5.shape(vocab_size=41),
    "untied, gated, wide heads": t5.shape(vocab_size=41, tied=False, mlp="geglu_tanh", head_size=12),
    "deep encoder, few buckets": t5.shape(vocab_size=41, num_encoder_layers=4, num_layers=1, relative_buckets=4, relative_distance=5),
    "two heads, deep decoder": t5.shape(
        vocab_size=41, num_heads=2, num_encoder_layers=1, num_layers=4, relative_buckets=32, relative_distance=128
    ),
}


@functools.cache
def theirs(name: str) -> torch.nn.Module:
    return t5.their_model(SHAPES[name], weights(SHAPES[name]))


def their_texts(name: str, sources: list[list[int]], **settings) -> list[list[int]]:
    """The new tokens up to the end token for each source, generated alone. `settings`: of transformers' generate.

    Without a cache, whose number of layers is that of the encoder in transformers 5.23: an IndexError where the decoder is deeper.
    """
    found = []
    for source in sources:
        config = GenerationConfig(
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            decoder_start_token_id=START,
            eos_token_id=END,
            use_cache=False,
            **settings,
        )
        ids = theirs(name).generate(torch.tensor([source]), attention_mask=torch.ones(1, len(source)).long(), generation_config=config)
        found += [until_end(row[1:]) for row in ids.tolist()]
    return found


def until_end(ids: list[int]) -> list[int]:
    return [*itertools.takewhile(lambda token: token != END, ids), *([END] if END in ids else [])]


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_texts_are_transformers(name):
    """All sources together, of different lengths. The texts differ, because the encoder read different sources."""
    found = [until_end(ids) for ids in written(decoder(SHAPES[name]), SOURCES, TOKENS, GREEDY)]
    assert found == their_texts(name, SOURCES)
    assert len({tuple(ids) for ids in found}) >= 3


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"length_penalty": 2.0}], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_four_beams_are_transformers(name, settings):
    """All four, best first. A repetition penalty looks at the start token and the target, not at the source."""
    for source in SOURCES[1:3]:
        params = BeamSearchParams(beams=BEAMS, max_new_tokens=TOKENS, ends=(END,), vocab_size=41, **settings)
        found = [list(beam.ids) for beam in beam_search(decoder(SHAPES[name]), source, params)]
        assert found == their_texts(name, [source], num_beams=BEAMS, num_return_sequences=BEAMS, **settings)


def test_rows_are_independent():
    """Rows that are dropped, reordered and admitted later go on as whole passes say, to 1e-5."""
    model = SHAPES["tied"]
    ours = decoder(model)

    def expected(source: list[int], target: list[int]) -> torch.Tensor:
        ids = torch.tensor([[START, *target]])
        with torch.no_grad():
            return theirs("tied")(input_ids=torch.tensor([source]), decoder_input_ids=ids).logits[0, -1]

    def check(logits: torch.Tensor, rows: list[tuple[list[int], list[int]]]) -> None:
        assert ours.lengths == [1 + len(target) for _, target in rows] or len(logits) < len(ours.lengths)
        for row, pair in zip(logits, rows, strict=True):
            assert float((row - expected(*pair)).abs().max()) <= 1e-5 * float(row.abs().max())

    a, b, c, d = SOURCES[:4]
    check(ours.admit([a, b, c]), [(a, []), (b, []), (c, [])])
    check(ours.step([5, 6, 7]), [(a, [5]), (b, [6]), (c, [7])])
    ours.drop(0)  # c takes its place
    check(ours.admit([d]), [(d, [])])
    check(ours.step([8, 9, 10]), [(c, [7, 8]), (b, [6, 9]), (d, [10])])
    ours.reorder([2, 2, 0, 1])
    check(ours.step([1, 2, 3, 4]), [(d, [10, 1]), (d, [10, 2]), (c, [7, 8, 3]), (b, [6, 9, 4])])
    ours.clear()
    assert ours.free == len(SOURCES) and ours.cache_bytes > 0
    check(ours.admit([b]), [(b, [])])


@pytest.mark.slow
def test_two_tensor_ranks_write_what_one_writes():
    """Greedy, drawn and with beams, token for token."""
    models = [SHAPES["tied"], SHAPES["untied, gated, wide heads"]]
    first, others = run_ranks(on_tensor_ranks, 2, models, TOKENS)
    alone = on_tensor_ranks(models, TOKENS)
    assert first == alone and others == []
    assert alone[0]["greedy"] != alone[0]["drawn"]


def test_bf16_is_near_fp32():
    """Logits of a step of a model with initial weights to 2 %, ‖a − b‖/‖b‖; the cache of a CPU is fp32."""
    model, kinds = SHAPES["tied"], (torch.bfloat16, torch.float32)
    low, full = (T5Decoder(t5.whole_model(model).to(dtype), model, ALONE, len(SOURCES), LENGTH, START) for dtype in kinds)
    for one in (low, full):
        one.admit(SOURCES)
    assert 0 < relative(low.step([2, 3, 4, 5]), full.step([2, 3, 4, 5])) <= 0.02
    assert low.cache_bytes == full.cache_bytes


def test_what_does_not_fit_is_refused():
    ours = decoder(SHAPES["tied"])
    with pytest.raises(ValueError, match=r"sources of \[3, 13\] tokens do not fit: they may have 1 to 12"):
        ours.admit([[1, 2, 3], [1] * 13])
    with pytest.raises(ValueError, match=r"sources of \[0\] tokens"):
        ours.admit([[]])
    assert ours.lengths == []
    with pytest.raises(UnusableLogits, match="model.mlp = 'variant:Mine'.*→ use a registered mlp"):
        T5Decoder(torch.nn.Module(), t5.shape(mlp="variant:Mine"), ALONE, 1, 8, START)


def test_sampling_draws_from_transformers_probabilities():
    """Of 400 first tokens drawn at temperature 1, each is as frequent as its probability says, to five standard deviations."""
    model, source, n = SHAPES["tied"], SOURCES[0], 400
    with torch.no_grad():
        logits = theirs("tied")(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[START]])).logits[0, 0]
    ours = decoder(model, slots=n)
    drawn = torch.tensor(written(ours, [source] * n, 1, SamplingParams(temperature=1.0)))[:, 0]
    for token, p in enumerate(logits.softmax(-1).tolist()):
        assert abs(int((drawn == token).sum()) - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1
