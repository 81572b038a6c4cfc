"""Greedy tokens are those of transformers, and a row's tokens do not depend on the batch, the slot or the other rows."""

import functools
import itertools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from models.conversion import mapping, read_config
from models.inference.decoder import Decoder
from models.inference.sampling_params import GREEDY
from models.norm import RMSNorm
from models.position import Position
from parallel.errors import Mistake
from parallel.layers import PlainModule
from tests.models.helpers.build import ALONE, fill, whole_model
from tests.models.helpers.decoding import DRAWN, LENGTH, PROMPTS, filled, logits_of, longer, written

COMMON = dict(vocab_size=83, bos_token_id=None, eos_token_id=None)
SIZES = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, max_position_embeddings=64, **COMMON)
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, **COMMON),
    "pythia": GPTNeoXConfig(num_attention_heads=4, **SIZES),
    "pythia, sequential residual": GPTNeoXConfig(num_attention_heads=4, use_parallel_residual=False, **SIZES),
    "llama": LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **SIZES),
}
TOKENS = 40


@functools.cache
def theirs(case: str):
    """Random weights so large that no two logits are nearly equal, and that texts do not repeat one token."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[case])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return model.eval()


def ours(case: str) -> PlainModule:
    shape = read_config.settings(CONFIGS[case])
    module = whole_model(shape)
    fill(module, mapping.from_hf(shape, CONFIGS[case].model_type, theirs(case).state_dict()))
    return module


@pytest.mark.parametrize("case", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(case):
    """Four prompts of different lengths, together here and each alone in transformers: all 40 tokens are equal, in fp32."""
    found = written(Decoder(ours(case), read_config.settings(CONFIGS[case]), ALONE, len(PROMPTS), 64), PROMPTS, TOKENS)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        true = theirs(case).generate(given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        assert ids == true[0, len(prompt) :].tolist()
    assert len(set(itertools.chain(*found))) > 12, "texts that repeat one token compare little"


@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("choice", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_text_does_not_depend_on_its_company(position, choice):
    """A row gets the same tokens alone, with three others, and with fewer others, in fp32."""
    model = longer(position=position, num_kv_heads=2)
    alone = [written(Decoder(filled(model), model, ALONE, 1, LENGTH), [prompt], 16, choice)[0] for prompt in PROMPTS[:1]]
    together = written(Decoder(filled(model), model, ALONE, 6, LENGTH), PROMPTS, 16, choice)
    assert together[0] == alone[0]
    assert written(Decoder(filled(model), model, ALONE, 2, LENGTH), PROMPTS[:2], 16, choice) == together[:2]


def test_rows_come_and_go():
    """With random admissions and departures in few slots, every row's logits are those of its own tokens alone, to 1e-5."""
    model = longer(position="rotary", num_kv_heads=2)
    alone, decoder = filled(model), Decoder(filled(model), model, ALONE, 3, LENGTH)
    rng, texts = random.Random(0), []
    for turn in range(40):
        if decoder.free and (not texts or rng.random() < 0.4):
            new = [[rng.randrange(83) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, decoder.free))]
            logits, moved = decoder.admit(new), new
            texts += new
        else:
            for text in texts:
                text.append(rng.randrange(83))
            logits, moved = decoder.step([text[-1] for text in texts]), texts
        for row, text in zip(logits, moved, strict=True):
            true = logits_of(alone, model, text)
            assert (row - true).abs().max() <= 1e-5 * true.abs().max(), turn
        for row in reversed(range(len(texts))):
            if len(texts[row]) > 20 or rng.random() < 0.15:
                decoder.drop(row)
                last = texts.pop()
                if row < len(texts):
                    texts[row] = last
        assert decoder.lengths == [len(text) for text in texts]


def test_rows_go_on_from_others():
    """Four rows that continue three others, as in beam search."""
    model = longer(num_kv_heads=2)
    alone, decoder = filled(model), Decoder(filled(model), model, ALONE, 4, LENGTH)
    texts = [list(prompt) for prompt in PROMPTS[:3]]
    decoder.admit(texts)
    decoder.reorder([2, 0, 2, 1])
    texts = [[*texts[parent], 9 + i] for i, parent in enumerate([2, 0, 2, 1])]
    found = decoder.step([text[-1] for text in texts])
    for row, text in zip(found, texts, strict=True):
        assert torch.allclose(row, logits_of(alone, model, text), atol=1e-5)


class Backwards(Position):
    """Takes positions from `self.places`, as it must."""

    def rotate(self, q, k):
        angle = self.places.of(q)[..., None].to(q.dtype)
        return q * angle.cos(), k * angle.cos()


class OwnNorm(RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("setting", "own"), [("position", Backwards), ("norm", OwnNorm)])
def test_an_experiment_s_own_class_is_decoded(setting, own):
    model, variants = longer(**{setting: f"variant:{own.__name__}"}), {own.__name__: own}
    alone, decoder = filled(model, variants=variants), Decoder(filled(model, variants=variants), model, ALONE, 2, LENGTH)
    assert decoder.uncached is None
    decoder.admit([[1, 2, 3], [4]])
    found = decoder.step([5, 6])
    for row, text in zip(found, ([1, 2, 3, 5], [4, 6]), strict=True):
        assert torch.allclose(row, logits_of(alone, model, text), atol=1e-5)


def test_more_places_than_were_learned_are_refused():
    model = longer()
    with pytest.raises(Mistake, match="25 tokens is longer than the learned positions → use model.seq_length = 24"):
        Decoder(filled(model), model, ALONE, 1, LENGTH + 1)
    model = longer(position="rotary")
    decoder = Decoder(filled(model), model, ALONE, 1, 40)
    assert len(written(decoder, [[1]], 40)[0]) == 40
