"""The size of a variant with as many parameters as its baseline."""

import pytest

from models.estimates.flops import training_flops
from models.estimates.parameters import parameters
from research.ablation.equal_size import SIZES, with_equal_size
from tests.research.helpers.example import MODEL, example


def test_swiglu_gets_two_thirds_of_the_width() -> None:
    """Three matrices in place of two: 2/3 of ffn_size, as in arXiv:2002.05202."""
    baseline = example().model
    found = with_equal_size(example(model={"mlp": "swiglu"}).model, baseline, "params")
    assert found is not None and (found.now, found.ffn_size, found.target) == (768, 512, parameters(baseline))
    assert found.size == parameters(example(model={"mlp": "swiglu", "ffn_size": 512}).model)
    assert abs(found.size - found.target) < 0.005 * found.target


@pytest.mark.parametrize("changes", [{"tied": False, "vocab_size": 1000}, {"num_kv_heads": 2}, {"qk_norm": True}, {"num_layers": 3}])
def test_other_changes_are_made_up_for_within_half_a_percent(changes: dict) -> None:
    baseline, model = example(model={"vocab_size": changes.get("vocab_size", MODEL["vocab_size"])}).model, example(model=changes).model
    found = with_equal_size(model, baseline, "params")
    assert found is not None
    counted = parameters(example(model=changes | {"ffn_size": found.ffn_size}).model)
    assert counted == found.size and counted == pytest.approx(parameters(baseline), rel=0.005)


def test_no_size_fits() -> None:
    for what in SIZES:
        assert with_equal_size(example(model={"num_layers": 40}).model, example(model={"num_layers": 1}).model, what) is None
        assert with_equal_size(example(model={"norm": "variant:Mine"}).model, example().model, what) is None


@pytest.mark.parametrize("changes", [{"mlp": "swiglu"}, {"num_layers": 3}, {"seq_length": 256}])
def test_equal_flops(changes: dict) -> None:
    baseline = example().model
    found = with_equal_size(example(model=changes).model, baseline, "flops")
    assert found is not None and found.target == training_flops(baseline)
    assert found.size == training_flops(example(model=changes | {"ffn_size": found.ffn_size}).model)
    assert found.size == pytest.approx(found.target, rel=0.005)
