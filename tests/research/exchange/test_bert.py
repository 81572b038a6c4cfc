"""BERT and MegatronBERT from a folder of transformers into a run, and out again, with the certificate of parity."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, MegatronBertConfig, MegatronBertForPreTraining

from models.conversion import mapping
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from research.cli import export
from research.config import Masked, serialization
from research.exchange.importer import CERTIFICATE
from research.exchange.parity import NEXT, OWN, certify
from tests.research.helpers.hf_models import LENGTH, VOCAB, imported, their_tokenizer

SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=LENGTH,
)  # fmt: skip
CASES = {
    "bert": BertForPreTraining(BertConfig(**SIZES)),
    "bert, masked tokens alone": BertForMaskedLM(BertConfig(**SIZES, type_vocab_size=3)),
    "megatron": MegatronBertForPreTraining(MegatronBertConfig(**SIZES)),
}


def saved(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """Random weights, norms about one and biases far from zero, as transformers writes them with a tokenizer."""
    model, g = CASES[case], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=g) / parameter.dim())
    model.save_pretrained(folder)
    their_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again_it_is_the_same_to_the_bit(case: str, tmp_path) -> None:
    """Both certificates pass, the experiment can train it further, and the export holds what the import read."""
    theirs = saved(case, tmp_path / "theirs")
    run = imported(tmp_path / "theirs", tmp_path, "mine")
    settings = serialization.load(run.config)
    head = case != "bert, masked tokens alone"
    assert settings.model.kind == "bert" and settings.model.sentence_head == head
    assert settings.data.examples == Masked(rate=0.15, mask="<mask>", sentence_order=head)
    export.main([str(run.path), str(tmp_path / "out")])
    for certificate in (run.path / CERTIFICATE, tmp_path / "out" / CERTIFICATE):
        assert json.loads(certificate.read_text())["relative"] < 1e-5
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_the_files_say_whether_there_is_a_sentence_head(tmp_path) -> None:
    """bert-base's config.json names BertForMaskedLM, and its weights have both heads."""
    saved("bert", tmp_path / "theirs")
    table = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(table | {"architectures": ["BertForMaskedLM"]}))
    run = imported(tmp_path / "theirs", tmp_path, "mine")
    model = serialization.load(run.config).model
    with Reader(latest(run.checkpoints)) as reader:
        assert model.sentence_head and set(reader) == mapping.shapes(model).keys()


def test_the_perplexity_of_a_bert_is_of_the_place_s_own_token() -> None:
    """A model that gives each place's token probability ¾: that is its perplexity, and not that of the tokens that follow."""
    ids = torch.tensor([[0, 1, 1, 0]])

    def knows() -> object:
        return lambda ids: torch.stack([torch.where(ids == token, 0.75, 0.25).log() for token in (0, 1)], -1)

    assert certify(ids, knows, knows, ahead=OWN).perplexity_ours == pytest.approx(4 / 3)
    assert certify(ids, knows, knows, ahead=NEXT).perplexity_ours == pytest.approx((0.75 * 0.25**2) ** (-1 / 3))
