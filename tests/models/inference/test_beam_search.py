"""Beams are equal to those of transformers: tokens, order and scores."""

import functools
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models.conversion import mapping, read_config
from models.inference.beam_search import Beam, BeamSearchParams, beam_search
from models.inference.decoder import Decoder
from tests.models.helpers.build import ALONE, fill, whole_model
from tests.models.helpers.decoding import PROMPTS

ENDS, TOKENS = [3, 9], 14
COMMON = dict(vocab_size=31, bos_token_id=None, eos_token_id=ENDS)
CONFIGS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **COMMON)),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            max_position_embeddings=32, **COMMON,
        ),
    ),
}  # fmt: skip
SETTINGS = [{}, {"length_penalty": 0.0}, {"length_penalty": 2.0}, {"early_stopping": True}, {"repetition_penalty": 1.4}]
QUICK = [
    ("llama", {}),
    *(("gpt2", settings) for settings in ({"length_penalty": 0.0}, {"early_stopping": True}, {"repetition_penalty": 1.4})),
]
"""The settings are tried quickly with one family, the families with one setting."""


@functools.cache
def theirs(case: str, seed: int):
    """A model with random weights, in which some beams end and some do not."""
    kind, config = CONFIGS[case]
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    return model.eval()


def ours(case: str, seed: int, beams: int) -> Decoder:
    config = CONFIGS[case][1]
    shape = read_config.settings(config)
    module = whole_model(shape)
    fill(module, mapping.from_hf(shape, config.model_type, theirs(case, seed).state_dict()))
    return Decoder(module, shape, ALONE, beams, 32)


def their_beams(case: str, seed: int, prompt: list[int], beams: int, **settings) -> list[tuple[tuple[int, ...], float]]:
    ids = torch.tensor([prompt])
    found = theirs(case, seed).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, num_beams=beams, num_return_sequences=beams, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    texts = [ids[len(prompt) :] for ids in found.sequences.tolist()]
    ends = [next((i + 1 for i, token in enumerate(text) if token in ENDS), len(text)) for text in texts]
    return list(zip([tuple(text[:end]) for text, end in zip(texts, ends, strict=True)], found.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize(
    ("case", "settings"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in itertools.product(CONFIGS, SETTINGS)],
    ids=str,
)
def test_beams_are_those_of_transformers(case, settings):
    """Every beam, best first, with scores to 1e-4. Three models, two prompts, two and four beams."""
    ended = set()
    for seed in range(3):
        for beams in (2, 4):
            for prompt in ([5], [7, 2, 20, 11]):
                found = beam_search(ours(case, seed, beams), prompt, BeamSearchParams(beams, TOKENS, ENDS, **settings))
                true = their_beams(case, seed, prompt, beams, **settings)
                assert [beam.ids for beam in found] == [ids for ids, _ in true]
                assert [beam.score for beam in found] == pytest.approx([score for _, score in true], abs=1e-4)
                assert all(beam.ended == (beam.ids[-1] in ENDS) for beam in found)
                ended |= {beam.ended for beam in found}
    assert ended == {True, False}, "beams that all end alike compare little"


def test_a_single_beam_is_greedy():
    decoder = ours("gpt2", 0, 1)
    (beam,) = beam_search(decoder, PROMPTS[0], BeamSearchParams(1, 8))
    logits, greedy = decoder.admit([PROMPTS[0]]), []
    for _ in range(8):
        greedy.append(int(logits.argmax()))
        logits = decoder.step(greedy[-1:])
    assert beam.ids == tuple(greedy) and not beam.ended


def test_only_the_tokenizer_s_ids_are_searched():
    found = beam_search(ours("gpt2", 0, 4), [5], BeamSearchParams(4, 8, vocab_size=10))
    assert len(found) == 4 and all(isinstance(beam, Beam) and max(beam.ids) < 10 for beam in found)
