"""Tensor ranks write what one rank writes: tokens, beams, and every order that the first gives."""

import pytest

from models.inference.decoder import Decoder
from models.inference.sampling_params import GREEDY
from tests.harness import run_ranks
from tests.models.helpers import decoding
from tests.models.helpers.build import ALONE
from tests.models.helpers.decoding import DRAWN, LENGTH, PROMPTS, filled, longer, written


def many() -> list:
    """Shared kv heads among them: at tensor 4 two neighbours use one; a vocabulary that is padded."""
    rows = [("learned", 4, "pre_norm"), ("rotary", 2, "parallel"), ("alibi", 2, "post_norm"), ("none", 1, "pre_norm")]
    return [longer(position=p, num_kv_heads=k, residual=r, qk_norm=k == 2, tied=k == 4) for p, k, r in rows]


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_ranks_write_what_one_writes(tensor):
    """Token for token, greedy and drawn, in fp32."""
    decoders = [Decoder(filled(model), model, ALONE, len(PROMPTS), LENGTH) for model in many()]
    alone = [[written(decoder, PROMPTS, 16, choice) for choice in (GREEDY, DRAWN)] for decoder in decoders]
    first, *others = run_ranks(decoding.on_tensor_ranks, tensor, many(), [GREEDY, DRAWN], 16)
    assert first == alone and others == [[]] * (tensor - 1)
    assert alone[0][0] != alone[0][1]


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_order_reaches_the_other_ranks(tensor):
    """Rows that come, go, change places and are cleared, and a beam search: logits to 1e-5, beams equal."""
    model = longer(position="rotary", num_kv_heads=2)
    first, *others = run_ranks(decoding.ordered, tensor, model)
    alone = decoding.carried_out(Decoder(filled(model), model, ALONE, 4, LENGTH))
    assert others == [None] * (tensor - 1)
    assert [beam[0] for beam in first["beams"]] == [beam[0] for beam in alone["beams"]]
    for found, true in zip(first["logits"], alone["logits"], strict=True):
        assert abs(found - true).max() <= 1e-5 * abs(true).max()
