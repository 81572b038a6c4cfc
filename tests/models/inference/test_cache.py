"""Decoding one token at a time with the cache gives the logits of a plain forward pass over all tokens, for every scheme."""

import copy
import itertools

import pytest
import torch

from models.block import RESIDUALS
from models.inference.cache import CachedCore, CacheRows
from models.inference.decoder import Decoder
from models.position import POSITIONS
from tests.models.helpers.build import ALONE
from tests.models.helpers.decoding import LENGTH, PROMPTS, filled, logits_of, longer

CASES = [*itertools.product(POSITIONS, (4, 2, 1), RESIDUALS)]


def differences(model, dtype=torch.float32, steps: int = 6) -> float:
    """The largest difference of a logit, relative to the largest logit, between four prompts in one cache and each alone without one."""
    module = filled(model, dtype=dtype)
    whole = copy.deepcopy(module)
    decoder = Decoder(module, model, ALONE, len(PROMPTS), LENGTH)
    found, texts = [decoder.admit(PROMPTS)], [list(prompt) for prompt in PROMPTS]
    for step in range(steps):
        ids = [(31 * step + 7 * i) % model.vocab_size for i in range(len(texts))]
        texts = [[*text, token] for text, token in zip(texts, ids, strict=True)]
        found.append(decoder.step(ids))
    with torch.no_grad():
        true = torch.stack([whole(torch.tensor([text]))[0, -steps - 1 :] for text in texts], dim=1)
    return float((torch.stack(found) - true).abs().max() / true.abs().max())


@pytest.mark.parametrize(("position", "kv_heads", "residual"), CASES)
def test_every_scheme_is_decoded_as_it_is_computed(position, kv_heads, residual):
    """fp32, 1e-5. The lengths differ, so each row has other positions, and other keys to mask."""
    more = dict(qk_norm=True, head_size=12, output_bias=False) if kv_heads == 2 else {}
    assert differences(longer(position=position, num_kv_heads=kv_heads, residual=residual, **more)) <= 1e-5


@pytest.mark.parametrize("position", POSITIONS)
def test_in_double_precision_nothing_but_rounding_is_left(position):
    """1e-12, but 1e-6 where a scheme's own tables are fp32."""
    exact = position in ("learned", "none")
    assert differences(longer(position=position, num_kv_heads=2), torch.float64) <= (1e-12 if exact else 1e-6)


@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
def test_bf16_is_as_good_as_bf16(position):
    """The distance from fp32 is at most twice that of bf16 without a cache."""
    model = longer(position=position, num_kv_heads=2)
    exact, low = filled(model), filled(model, dtype=torch.bfloat16)
    decoder = Decoder(filled(model, dtype=torch.bfloat16), model, ALONE, 1, LENGTH)
    ids = [3 * i % model.vocab_size for i in range(LENGTH)]
    found = decoder.admit([ids[:4]])
    for token in ids[4:]:
        found = decoder.step([token])
    true = logits_of(exact, model, ids)
    assert (found[0] - true).norm() <= 2 * (logits_of(low, model, ids) - true).norm()


def test_partial_rotary_and_dropout_settings_change_nothing():
    """The rest of a head is not rotated. In evaluation nothing is dropped, even by the core with dropout."""
    drops = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
    assert differences(longer(position="rotary", rotary_fraction=0.5, **drops)) <= 1e-5


def test_rows_know_their_positions():
    rows = CacheRows(3, 8, torch.device("cpu"))
    x, q = torch.zeros(2, 4, 5), torch.zeros(2, 6, 4, 5)
    rows.prefill([4, 2])
    assert rows.prefilling and rows.of(x).tolist() == rows.of(q).tolist() == [0, 1, 2, 3] and rows.first == 0
    rows.prefill([1])
    assert rows.first == 2 and rows.lengths == [4, 2, 1]
    rows.advance()
    x, q = torch.zeros(3, 1, 5), torch.zeros(3, 6, 1, 5)
    assert rows.lengths == [5, 3, 2] and rows.of(x).tolist() == [[4], [2], [1]] and rows.of(q).shape == (3, 1, 1)
    assert rows.of_keys(q).tolist() == [0, 1, 2, 3, 4]
    mask = rows.mask(q)
    assert mask is not None and (mask == 0).sum(-1).flatten().tolist() == [5, 3, 2] and rows.mask(q) is mask
    table = torch.arange(8)[:, None]
    assert rows.rows(table, x).flatten().tolist() == [4, 2, 1]


def test_equal_lengths_need_no_mask():
    rows = CacheRows(2, 8, torch.device("cpu"))
    rows.prefill([3, 3])
    rows.advance()
    assert rows.mask(torch.zeros(2, 6, 1, 5)) is None


def test_what_does_not_fit_is_refused():
    rows = CacheRows(2, 4, torch.device("cpu"))
    for lengths in ([5], [1, 1, 1], [0], []):
        with pytest.raises(ValueError, match="do not fit|empty"):
            rows.prefill(lengths)
    with pytest.raises(ValueError, match="cannot take another"):
        rows.advance()
    rows.prefill([4])
    with pytest.raises(ValueError, match="have room for 4"):
        rows.advance()


def test_the_cache_is_static_and_holds_the_kv_heads_alone():
    model = longer(num_kv_heads=2)
    decoder = Decoder(filled(model), model, ALONE, 3, LENGTH)
    cores = [part for part in decoder.module.modules() if isinstance(part, CachedCore)]
    places = [core.keys.data_ptr() for core in cores]
    assert [tuple(core.keys.shape) for core in cores] == [(3, 2, LENGTH, 8)] * 2
    decoder.admit(PROMPTS[:2])
    decoder.step([1, 2])
    assert [core.keys.data_ptr() for core in cores] == places
    assert all(
        core.keys.dtype == torch.float32 for core in Decoder(filled(model, dtype=torch.bfloat16), model, ALONE, 1, 4).sequences.cores
    )
