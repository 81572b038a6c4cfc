"""With a driver and workers, tensor ranks give the same tokens, logits and beams as one rank."""

import pytest

from models.inference.decoder import Decoder
from models.inference.sampling_params import GREEDY
from tests.harness import run_ranks
from tests.models.helpers import decoding
from tests.models.helpers.build import ALONE
from tests.models.helpers.decoding import DRAWN, LENGTH, PROMPTS, filled, longer, written


def many() -> list:
    """With shared kv heads (at tensor 4 two neighbouring ranks use one) and a padded vocabulary."""
    rows = [("learned", 4, "pre_norm"), ("rotary", 2, "parallel"), ("alibi", 2, "post_norm"), ("none", 1, "pre_norm")]
    return [longer(position=p, num_kv_heads=k, residual=r, qk_norm=k == 2, tied=k == 4) for p, k, r in rows]


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_ranks_generate_what_one_rank_generates(tensor):
    """Token for token, greedy and drawn, in fp32."""
    decoders = [Decoder(filled(model), model, ALONE, len(PROMPTS), LENGTH) for model in many()]
    alone = [[written(decoder, PROMPTS, 16, choice) for choice in (GREEDY, DRAWN)] for decoder in decoders]
    first, *others = run_ranks(decoding.on_tensor_ranks, tensor, many(), [GREEDY, DRAWN], 16)
    assert first == alone and others == [[]] * (tensor - 1)
    assert alone[0][0] != alone[0][1]


@pytest.mark.slow  # test_variants.py and test_variant_check.py make the same calls on two ranks
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_call_of_the_driver_reaches_the_workers(tensor):
    """Rows that are admitted, stepped, dropped, reordered and cleared, and a beam search: logits to 1e-5, beams equal."""
    model = longer(position="rotary", num_kv_heads=2)
    first, *others = run_ranks(decoding.carried_out_by_driver, tensor, model)
    alone = decoding.carried_out(Decoder(filled(model), model, ALONE, 4, LENGTH))
    assert others == [None] * (tensor - 1)
    assert [beam[0] for beam in first["beams"]] == [beam[0] for beam in alone["beams"]]
    for found, true in zip(first["logits"], alone["logits"], strict=True):
        assert abs(found - true).max() <= 1e-5 * abs(true).max()
