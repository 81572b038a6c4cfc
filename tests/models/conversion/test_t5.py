"""UMT5 and T5 of transformers: weights and settings there and back, T5's one table a stack in every block, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration, UMT5ForConditionalGeneration

from models.conversion import mapping, read_config
from models.conversion.write_config import config, left_behind
from models.encoder_config import T5
from models.estimates.parameters import parameters
from parallel.errors import Mistake
from tests.models.helpers import t5
from tests.models.helpers.build import fill, relative
from tests.models.helpers.conversion import to_hf
from tests.models.helpers.t5 import PADDING, batch, random_weights, shape, their_model, their_names, their_settings, whole_model

IMPORTED = dict(source_length=512, seq_length=512, init="gpt2", start_token=0)
"""What an import sets: the length T5 was trained with, and the token that a target begins with."""
MODELS = {
    "tied": shape(**IMPORTED),
    "gated, wide heads": shape(mlp="geglu_tanh", head_size=12, num_encoder_layers=3, num_layers=1, **IMPORTED),
}
UNTIED = shape(tied=False, **IMPORTED)


def in_fp32(model: T5) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(model).items()}


def logits(model: T5, weights: dict[str, torch.Tensor], pairs: t5.Batch) -> torch.Tensor:
    module = whole_model(model)
    fill(module, weights)
    with torch.no_grad():
        return module(pairs.inputs(model))


def their_logits(theirs: torch.nn.Module, model: T5, pairs: t5.Batch) -> torch.Tensor:
    (source, target), (of_source, _) = (x.split([model.source_length, model.seq_length], 1) for x in (pairs.ids, pairs.segments))
    with torch.no_grad():
        return theirs(input_ids=source, attention_mask=(of_source != PADDING).long(), decoder_input_ids=target).logits


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_to_the_bit(name, tmp_path):
    """From what transformers writes; our names as in a table of the tests' own."""
    model, weights = MODELS[name], in_fp32(MODELS[name])
    their_model(model, weights).save_pretrained(tmp_path)
    settings, theirs = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert read_config.settings(settings) == model and not read_config.unread_keys(settings)
    ours = mapping.from_hf(model, "umt5", theirs)
    assert ours.keys() == weights.keys() and all(torch.equal(ours[name], tensor) for name, tensor in weights.items())
    back = to_hf(model, "umt5", ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("model", [*MODELS.values(), UNTIED], ids=[*MODELS, "untied"])
def test_transformers_reads_what_we_write(model, tmp_path):
    """No tensor is missing or left over, and logits are equal. transformers 5.23 scales those of an untied UMT5 by 1/√d as well."""
    assert mapping.family_of(model) == "umt5"
    weights, small = in_fp32(model), T5(**model.model_dump() | dict(source_length=12, seq_length=8))
    save_file({k: v.contiguous() for k, v in to_hf(model, "umt5", weights).items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config(model, "umt5", "float32", 3, 1)))
    read, info = UMT5ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert read.config.decoder_start_token_id == 3
    scale = 1.0 if model.tied else model.hidden_size**-0.5
    real = batch(small).segments[:, 12:] != PADDING
    found, theirs = logits(small, weights, batch(small)) * scale, their_logits(read.eval(), small, batch(small))
    assert relative(found[real], theirs[real]) <= 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["1.0", "1.1"])
def test_a_t5_s_table_is_copied_to_every_block(tied, tmp_path):
    """T5 1.0, whose tied head is scaled, and 1.1, whose head is a table of its own: logits are equal in fp32, all weights are used."""
    model = shape(tied=tied, mlp="relu" if tied else "geglu_tanh", **IMPORTED)
    theirs = T5ForConditionalGeneration(T5Config(**their_settings(model), tie_word_embeddings=tied)).eval()
    if not tied:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(model.vocab_size, model.hidden_size))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    settings = theirs.config.to_dict() | {"tie_word_embeddings": tied}  # transformers 5 does not write what it was given
    assert read_config.settings(settings) == model
    ours = mapping.from_hf(model, "t5", state)
    for stack, number in (("encoder", 2), ("decoder", 3)):
        table = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert all(torch.equal(ours[f"{stack}.blocks.{i}.attention.position.weight"], table) for i in range(number))
    small = T5(**model.model_dump() | dict(source_length=12, seq_length=8))
    real = batch(small).segments[:, 12:] != PADDING
    assert relative(logits(small, ours, batch(small))[real], their_logits(theirs, small, batch(small))[real]) <= 1e-5


def test_settings_there_and_back():
    for model in (*MODELS.values(), UNTIED, shape(num_layers=1, **IMPORTED)):
        written = config(model, "umt5", "float32", 0, 1)
        assert read_config.settings(written) == model and not read_config.unread_keys(written)
    assert left_behind(shape(mlp_dropout=0.2, residual_dropout=0.1), "umt5") == ["model.mlp_dropout = 0.2", "model.init = 't5'"]


def test_shapes_are_those_of_the_built_model():
    for model in (*MODELS.values(), UNTIED):
        built = {name: tuple(tensor.shape) for name, tensor in random_weights(model).items()}
        assert mapping.shapes(model).keys() == built.keys() and mapping.shapes(model) == built
        assert sum(tensor.numel() for tensor in their_names(model, random_weights(model)).values()) == parameters(model)


def test_what_cannot_be_read_or_written_is_refused():
    written = config(MODELS["tied"], "umt5", "float32", 0, 1)
    with pytest.raises(Mistake, match="feed_forward_proj = 'gated-relu' has no counterpart here"):
        read_config.settings(written | {"feed_forward_proj": "gated-relu"})
    with pytest.raises(Mistake, match="is_encoder_decoder = False has no counterpart here"):
        read_config.settings(written | {"is_encoder_decoder": False})
    for start in (83, -1, True):
        with pytest.raises(Mistake, match=f"decoder_start_token_id = {start}, which is not an id below vocab_size = 83"):
            read_config.settings(written | {"decoder_start_token_id": start})
    assert not read_config.settings(written | {"scale_decoder_outputs": False}).tied
    with pytest.raises(Mistake, match="model.mlp = 'relu2' is no umt5"):
        mapping.family_of(shape(mlp="relu2"))
    tensors = to_hf(MODELS["tied"], "umt5", in_fp32(MODELS["tied"]))
    name = "decoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(Mistake, match=f"the weights hold no {name}"):
        mapping.from_hf(MODELS["tied"], "umt5", {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(Mistake, match="the weights hold 3 tensors that this model lacks"):
        mapping.from_hf(MODELS["tied"], "t5", tensors)
