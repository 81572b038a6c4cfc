"""The errors of the model config, sentence by sentence, and what it accepts."""

import pytest
from pydantic import ValidationError

from models.config import CHOICES, FOLLOWING, GPT
from tests.models.helpers.build import LLAMA_3, ROTARY, SHAPE, shape

SENTENCES = [
    (dict(num_heads=5), "model.num_heads = 5 does not divide model.hidden_size = 32 → use 1, 2, 4, 8, 16 or 32, or set model.head_size"),
    (dict(num_kv_heads=3), "model.num_kv_heads = 3 does not divide model.num_heads = 4 → use 1, 2 or 4"),
    (dict(num_kv_heads=8), "model.num_kv_heads = 8 does not divide model.num_heads = 4 → use 1, 2 or 4"),
    (dict(norm="batchnorm"), "model.norm = 'batchnorm' is not known → use layernorm, rmsnorm or variant:YourClass"),
    (dict(position="rope"), "model.position = 'rope' is not known → use learned, sinusoidal, rotary, alibi, none or variant:YourClass"),
    (
        dict(mlp="silu"),
        "model.mlp = 'silu' is not known → use gelu, gelu_tanh, relu, relu2, swiglu, geglu, geglu_tanh or variant:YourClass",
    ),
    (dict(residual="Parallel"), "model.residual = 'Parallel' is not known → use pre_norm, post_norm, parallel or variant:YourClass"),
    (dict(init="xavier"), "model.init = 'xavier' is not known → use gpt2, small_wang or variant:YourClass"),
    (dict(norm="variant:"), "model.norm = 'variant:' is not known → use layernorm, rmsnorm or variant:YourClass"),
    (dict(norm="variant:a b"), "model.norm = 'variant:a b' is not known → use layernorm, rmsnorm or variant:YourClass"),
    (
        ROTARY | dict(rotary_base=None),
        "model.position = 'rotary' needs model.rotary_base → set it (Llama 2: fraction 1.0, base 10000.0, scaling none)",
    ),
    (
        ROTARY | dict(rotary_fraction=None),
        "model.position = 'rotary' needs model.rotary_fraction → set it (Llama 2: fraction 1.0, base 10000.0, scaling none)",
    ),
    (
        ROTARY | dict(rotary_scaling=None),
        "model.position = 'rotary' needs model.rotary_scaling → set it (Llama 2: fraction 1.0, base 10000.0, scaling none)",
    ),
    (
        ROTARY | dict(rotary_scaling="linear"),
        "model.rotary_scaling = 'linear' needs model.rotary_factor → "
        "set it (Llama 3.1: factor 8.0, low 1.0, high 4.0, original length 8192)",
    ),
    (
        ROTARY | LLAMA_3 | dict(rotary_original_length=None),
        "model.rotary_scaling = 'llama3' needs model.rotary_original_length → "
        "set it (Llama 3.1: factor 8.0, low 1.0, high 4.0, original length 8192)",
    ),
    (
        ROTARY | LLAMA_3 | dict(rotary_scaling="linear"),
        "model.rotary_low_factor has no effect with model.rotary_scaling = 'linear' → leave it out",
    ),
    (ROTARY | dict(rotary_factor=2.0), "model.rotary_factor has no effect with model.rotary_scaling = 'none' → leave it out"),
    (dict(rotary_factor=2.0), "model.rotary_factor has no effect with model.rotary_scaling = None → leave it out"),
    (dict(rotary_scaling="none"), "model.rotary_scaling has no effect with model.position = 'learned' → leave it out"),
    (
        ROTARY | LLAMA_3 | dict(rotary_high_factor=1.0),
        "model.rotary_low_factor = 1.0 is not below model.rotary_high_factor = 1.0 → Llama 3.1 has 1.0 and 4.0",
    ),
    (dict(rotary_base=1e4), "model.rotary_base has no effect with model.position = 'learned' → leave it out"),
]


@pytest.mark.parametrize(("changes", "sentence"), SENTENCES)
def test_sentences(changes, sentence):
    with pytest.raises(ValidationError) as caught:
        shape(**changes)
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {sentence}"]


@pytest.mark.parametrize("size", ["num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "seq_length"])
@pytest.mark.parametrize("value", [0, -4])
def test_sizes_are_positive(size, value):
    with pytest.raises(ValidationError, match="greater than 0") as caught:
        shape(**{size: value})
    assert caught.value.errors()[0]["loc"] == (size,)


@pytest.mark.parametrize(
    "changes", [dict(norm_eps=0), ROTARY | dict(rotary_fraction=0.0), ROTARY | dict(rotary_fraction=1.5), ROTARY | dict(rotary_base=0)]
)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(ValidationError, match="greater than 0|less than or equal to 1"):
        shape(**changes)


@pytest.mark.parametrize("field", SHAPE)
def test_science_has_no_defaults(field):
    with pytest.raises(ValidationError, match="Field required"):
        GPT(**{name: value for name, value in SHAPE.items() if name != field})


def test_an_unknown_name_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        shape(n_layer=2)


def test_an_assignment_is_judged_like_a_file():
    model = shape()
    with pytest.raises(ValidationError, match="does not divide"):
        model.num_heads = 5
    model.num_heads = 8
    assert model.head_size == 4


def test_every_choice_is_allowed_and_so_is_a_class_of_one_s_own():
    for setting, names in CHOICES.items():
        for name in (*names, "variant:MyClass"):
            assert getattr(shape(**{setting: name}), setting) == name


def test_an_own_position_may_use_the_rotary_numbers_or_not():
    assert shape(position="variant:Mine", rotary_base=500.0).rotary_fraction is None


def test_it_survives_json():
    for model in (shape(), shape(position="rotary"), shape(norm="variant:Mine"), shape(head_size=6, output_bias=False)):
        found = GPT.model_validate_json(model.model_dump_json())
        assert found == model and found.model_fields_set & {*FOLLOWING} == model.model_fields_set & {*FOLLOWING}


def test_head_size_and_output_bias_follow_unless_they_are_set():
    model = shape(bias=False)
    assert (model.head_size, model.output_bias, model.model_dump()["head_size"]) == (8, False, None)
    model = shape(bias=False, head_size=6, output_bias=True, hidden_size=30)  # 4 heads do not divide 30
    assert (model.head_size, model.output_bias, model.model_dump()["head_size"]) == (6, True, 6)
    model.num_kv_heads = 2
    model.num_heads, model.bias = 2, True
    assert (model.head_size, model.output_bias) == (6, True)
