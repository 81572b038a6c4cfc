"""BERT and MegatronBERT of transformers: weights and settings there and back, older names, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining, BertConfig

from models.conversion import mapping, read_config
from models.conversion.families import FAMILIES
from models.conversion.write_config import config, left_behind
from models.encoder_config import BERT
from models.estimates.parameters import parameters
from parallel.errors import Mistake
from tests.models.helpers.bert import inputs, random_weights, shape, whole_model
from tests.models.helpers.build import fill, relative, values
from tests.models.helpers.build import shape as gpt_shape
from tests.models.helpers.conversion import to_hf
from tests.models.helpers.their_bert import CLASSES, SIZES, by_our_names, their_model

FAMILY = {"post_norm": "bert", "pre_norm": "megatron-bert"}
MODELS = [shape(residual=residual, sentence_head=head) for residual in FAMILY for head in (True, False)]
ON_EACH = pytest.mark.parametrize("residual", FAMILY)


def saved(folder, residual: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config.json, tensors) as transformers writes them."""
    their_model(residual).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@ON_EACH
def test_there_and_back_is_the_same_to_the_bit(residual: str, tmp_path) -> None:
    """From what transformers writes; our names as in a table of the tests' own."""
    settings, theirs = saved(tmp_path, residual)
    model = read_config.settings(settings)
    assert model == shape(residual=residual)
    ours = mapping.from_hf(model, FAMILY[residual], theirs)
    expected = by_our_names(residual, dict(their_model(residual).named_parameters()))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    back = to_hf(model, FAMILY[residual], ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.residual}, {'both heads' if model.sentence_head else 'one head'}")
def test_transformers_reads_what_we_write(model: BERT, tmp_path) -> None:
    """from_pretrained of our tensors and our config.json: no tensor is missing or left over, and the logits are equal in fp32."""
    family, weights = FAMILY[model.residual], {name: tensor.float() for name, tensor in random_weights(model).items()}
    written = {key: tensor.contiguous() for key, tensor in to_hf(model, family, weights).items()}
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config(model, family, "float32", None, None)))
    make = AutoModelForPreTraining if model.sentence_head else AutoModelForMaskedLM
    read, info = make.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    module = whole_model(model)
    fill(module, weights)
    ids, segments, types = inputs()
    theirs = read.eval()(ids, attention_mask=(segments >= 0).long(), token_type_ids=types)
    ours = module((ids, segments, types))
    if model.sentence_head:
        assert relative(ours[1], theirs.seq_relationship_logits) <= 1e-5
        ours, theirs = ours[0], theirs.prediction_logits
    else:
        theirs = theirs.logits
    assert relative(ours[segments >= 0], theirs[segments >= 0]) <= 1e-5


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_settings_there_and_back(model: BERT, tmp_path) -> None:
    """Our reader and transformers' read the same model from the config.json that we write."""
    family = mapping.family_of(model)
    assert family == FAMILY[model.residual]
    written = config(model, family, "float32", None, None)
    assert read_config.settings(written) == model and not read_config.unread_keys(written)
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is CLASSES[model.residual][0]
    assert {name: getattr(found, name) for name in SIZES} == SIZES and found.hidden_act == "gelu"


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_names_and_shapes_are_those_of_the_built_model(model: BERT) -> None:
    built = {name: tuple(tensor.shape) for name, tensor in values(whole_model(model)).items()}
    assert mapping.shapes(model) == built and list(mapping.shapes(model)) == list(built)


def test_bert_base_as_published() -> None:
    """110,106,428 parameters with both heads, as its weights count."""
    model = read_config.settings(BertConfig(architectures=["BertForPreTraining"]))
    assert parameters(model) == 110_106_428
    without = read_config.settings(BertConfig(architectures=["BertForMaskedLM"]))
    assert parameters(without) == 109_514_298


def test_the_names_of_older_files_are_read(tmp_path) -> None:
    """LayerNorm.gamma, a copy of the tied table and of its bias, and a buffer of positions, as the first BERTs have them."""
    settings, theirs = saved(tmp_path, "post_norm")
    model = read_config.settings(settings)
    ours = mapping.from_hf(model, "bert", theirs)
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for key, t in theirs.items()}
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    old["cls.predictions.decoder.weight"] = theirs["bert.embeddings.word_embeddings.weight"]
    copied = old | {"cls.predictions.decoder.bias": theirs["cls.predictions.bias"]}
    moved = dict(copied)
    del moved["cls.predictions.bias"]
    for files in (old, copied, moved):
        found = mapping.from_hf(model, "bert", files)
        assert all(torch.equal(found[name], tensor) for name, tensor in ours.items())


REFUSED = [
    ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new' has no counterpart here → only 'gelu'"),
    ({"is_decoder": True}, "is_decoder = True has no counterpart"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' has no counterpart"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings = False has no counterpart"),
    ({"num_attention_heads": 5}, "model.num_heads = 5 does not divide model.hidden_size = 768"),
    ({"type_vocab_size": 0}, "type_vocab_size = 0, which is not a count"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_configuration_that_we_cannot_express_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        read_config.settings({"model_type": "bert"} | changes)


def test_a_model_of_another_kind_or_family_is_refused() -> None:
    with pytest.raises(Mistake, match="model.kind = 'bert' is no gpt2 → that has 'gpt'"):
        to_hf(shape(), "gpt2", {})
    with pytest.raises(Mistake, match="model.kind = 'gpt' is no bert → that has 'bert'"):
        to_hf(gpt_shape(), "bert", {})
    with pytest.raises(Mistake, match="model.residual = 'pre_norm' is no bert → that has 'post_norm'"):
        to_hf(shape(residual="pre_norm"), "bert", {})
    with pytest.raises(Mistake, match=r"no family of transformers that we write \(bert, megatron-bert\) is this model: model.mlp = 'relu'"):
        mapping.family_of(shape(mlp="relu"))


def test_a_missing_head_is_named(tmp_path) -> None:
    """If the files hold another head. Files without any are a plain encoder's, whose other weights are read."""
    settings, theirs = saved(tmp_path, "post_norm")
    model = read_config.settings(settings)
    with pytest.raises(Mistake, match="hold no cls.seq_relationship.weight, which sentence.classifier.weight is made of"):
        mapping.from_hf(model, "bert", {key: tensor for key, tensor in theirs.items() if not key.startswith("cls.seq")})
    found = mapping.from_hf(model, "bert", {key: tensor for key, tensor in theirs.items() if not key.startswith("cls.")})
    heads = ("sentence.classifier.", "masked_lm.", "head_bias.")
    assert found.keys() == {name for name in mapping.shapes(model) if not name.startswith(heads)}


def test_dropout_is_theirs_where_they_have_a_word_for_it() -> None:
    model = shape(residual_dropout=0.2, attention_dropout=0.4, embedding_dropout=0.1)
    written = config(model, "bert", "float32", None, None)
    assert (written["hidden_dropout_prob"], written["attention_probs_dropout_prob"]) == (0.2, 0.4)
    assert left_behind(model, "bert") == ["model.embedding_dropout = 0.1", "model.init = 'gpt2'"]
    assert FAMILIES["bert"].kind == "bert"
