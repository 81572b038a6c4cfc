"""Plain encoders (transformers' BertModel) become a BERT whose heads have initial values; the certificate is of hidden states."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForPreTraining, MegatronBertForMaskedLM

from models import bert
from models.conversion import mapping
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research.cli import export
from research.config import Masked, serialization
from research.data import tokenizer_file
from research.exchange import plain_encoder
from research.exchange.importer import CERTIFICATE
from tests.research.helpers.example import sentence
from tests.research.helpers.hf_models import imported
from tests.research.helpers.launches import ROOT
from tests.research.helpers.plain_encoders import their_encoder, their_folder, their_wordpiece

HEADS = {"masked_lm.dense.weight", "masked_lm.dense.bias", "masked_lm.norm.weight", "masked_lm.norm.bias", "head_bias.bias"}
CLASSIFIER = {"sentence.classifier.weight", "sentence.classifier.bias"}


@pytest.mark.parametrize(("kind", "pooler", "exported"), [("bert", True, BertForPreTraining), ("megatron", False, MegatronBertForMaskedLM)])
def test_the_files_tensors_are_kept_and_heads_are_drawn(kind: str, pooler: bool, exported: type, tmp_path, capsys) -> None:
    """What the files hold comes out of an export bit for bit; the heads are those that a run of the experiment would begin with."""
    theirs = their_folder(tmp_path / "theirs", kind, pooler).state_dict()
    run = imported(tmp_path / "theirs", tmp_path, "mine")
    said = " ".join(capsys.readouterr().out.split())
    classifier = "sentence.classifier, " if pooler else ""
    assert f"a plain encoder, without heads: {classifier}masked_lm.dense, masked_lm.norm, head_bias have initial values" in said

    settings = serialization.load(run.config)
    assert settings.model.sentence_head == pooler
    assert settings.data.examples == Masked(rate=0.15, mask="[MASK]", sentence_order=pooler)
    drawn = dict(unique_parameters(PlainModule(bert.layers(settings.model, Grid(), settings.seed))))
    with Reader(latest(run.checkpoints)) as reader:
        assert set(reader) == mapping.shapes(settings.model).keys()
        for name in HEADS | (CLASSIFIER if pooler else set()):
            assert torch.equal(reader.read(name), drawn[name].detach())

    export.main([str(run.path), str(tmp_path / "out")])
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[f"bert.{name}"], tensor) for name, tensor in theirs.items() if not name.endswith("position_ids"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [exported.__name__]
    certificate = json.loads((run.path / CERTIFICATE).read_text())
    assert certificate["passed"] and certificate["relative"] < 1e-5 and certificate["of"] == "hidden states" and certificate["ids"]["equal"]


def test_the_tokenizer_writes_small_letters_and_knows_what_is_put_around_a_text(tmp_path) -> None:
    """[CLS] begins a text and [SEP] ends it, which is therefore the end of a text; decoding gives the small letters back."""
    theirs = their_wordpiece()
    theirs.save_pretrained(tmp_path)
    ours = tokenizer_file.load(str(tmp_path / "tokenizer.json"), ROOT)
    ids = theirs("The People of the Union").input_ids
    assert [*ours.begin, *ours.encode("The People of the Union"), *ours.behind] == ids
    assert (ours.begin, ours.behind, ours.end_of_text) == ((2,), (3,), 3)
    assert ours.decode(ours.encode("The People of the Union")) == "the people of the union"


def test_another_encoder_does_not_pass() -> None:
    """A difference of 3e-4 of the largest value, and one that is not a number."""
    ids = torch.arange(8)[None]
    model = their_encoder()
    theirs = lambda: lambda ids: model(ids)[0]  # noqa: E731
    largest = float(theirs()(ids).detach().abs().max())
    assert plain_encoder.certify(ids, theirs, theirs).relative == 0
    for change, passes in ((3e-5, True), (3e-4, False), (float("nan"), False)):
        found = plain_encoder.certify(ids, theirs, lambda change=change: lambda ids: theirs()(ids) + change * largest)
        assert found.passed == passes and (passes or "FAILED" in found.line())
        json.dumps(found.table(), allow_nan=False)


def test_an_encoder_with_half_a_head_is_no_plain_one() -> None:
    model = bert.BERT(
        num_layers=2, hidden_size=64, num_heads=4, ffn_size=96, vocab_size=331, seq_length=64, token_types=2, norm_eps=1e-12, mlp="gelu",
        residual="post_norm", init="gpt2", sentence_head=True, embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    plain = {f"bert.{name}": tuple(tensor.shape) for name, tensor in their_encoder().state_dict().items()}
    half = plain | {"cls.seq_relationship.weight": (2, 64)}
    assert set(mapping.plan(model, mapping.FAMILIES["bert"], plain).initial) == HEADS | CLASSIFIER
    said = sentence(lambda: mapping.plan(model, mapping.FAMILIES["bert"], half))
    assert "the weights hold no cls.seq_relationship.bias" in said
