"""UMT5 and T5 from a folder of transformers into a run, and out again: weights, the certificate, and the texts that `generate` writes."""

import copy
import itertools
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from research.__main__ import main
from research.cli import export
from research.config import Spans, serialization
from research.data import documents
from research.exchange.importer import CERTIFICATE, with_start
from research.exchange.pair_parity import PairParity
from tests.research.helpers.example import sentence, t5
from tests.research.helpers.hf_models import imported
from tests.research.helpers.launches import ROOT

VOCAB, PAD, END = 300, 0, 1
SIZES = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, relative_attention_num_buckets=8,
    relative_attention_max_distance=20, n_positions=64, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
)  # fmt: skip
CASES = {
    "umt5, deeper decoder, wide heads": (
        UMT5ForConditionalGeneration, UMT5Config(**SIZES | dict(num_decoder_layers=3, d_kv=12, feed_forward_proj="relu"))
    ),
    "umt5, untied": (UMT5ForConditionalGeneration, UMT5Config(**SIZES)),
    "t5 1.0": (T5ForConditionalGeneration, T5Config(**SIZES | dict(num_decoder_layers=1))),
    "t5 1.1": (T5ForConditionalGeneration, T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}  # fmt: skip
UNTIED = ("umt5, untied", "t5 1.1")
SLOW = ("umt5, untied", "t5 1.0")
SOURCES = ("The state of the union is strong.", "jobs", "We, the people, — and the budget of 2016")
TOKENS = 12


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that puts </s> behind a text, as T5's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([next(documents.documents("builtin:state_of_the_union/val", ROOT))[:5000]], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def theirs(case: str) -> transformers.PreTrainedModel:
    """Random weights that are large enough for texts that do not repeat one token, norms about one. Some texts end.

    Scores are not divided by √e: larger queries would make a softmax nearly 0 or 1, which multiplies rounding errors.
    """
    make, config = CASES[case]
    model, g = make(copy.deepcopy(config)).eval(), torch.Generator().manual_seed(1)
    if case in UNTIED:
        model.config.tie_word_embeddings = False  # transformers 5 does not keep what it was given
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, width = (1.0, 0.3) if parameter.dim() == 1 else (0.0, 0.1 if name.endswith("Attention.q.weight") else 0.4)
            parameter.copy_(centre + width * torch.randn(parameter.shape, generator=g))
        model.lm_head.weight[END] *= 3  # the embedding, if it is tied
    return model


def saved(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """A folder as it is published: an untied model says so, which transformers 5 itself no longer writes."""
    model = theirs(case)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    table = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": case not in UNTIED}
    (folder / "config.json").write_text(json.dumps(table))
    return load_file(folder / "model.safetensors")


def ids_of(run: Path, capsys, *options: str) -> list[list[int]]:
    """What `generate` writes."""
    prompts = [word for source in SOURCES for word in ("--prompt", source)]
    assert main(["generate", str(run), *prompts, "--max_new_tokens", str(TOKENS), "--json", *options]) == 0
    return [json.loads(line)["ids"] for line in capsys.readouterr().out.splitlines()]


def their_ids(case: str, beams: int) -> list[list[int]]:
    """What transformers' `generate` writes, of the model that was never in a file, after sources as transformers' tokenizer makes them."""
    model, words = theirs(case), tokenizer()
    settings = GenerationConfig(
        num_beams=beams, max_new_tokens=TOKENS, do_sample=False, use_cache=False,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    found = []
    for source in SOURCES:
        ids = model.generate(**words(source, return_tensors="pt", return_token_type_ids=False), generation_config=settings)[0, 1:].tolist()
        found.append(ids[: len(list(itertools.takewhile(lambda token: token != END, ids))) + 1])
    return found


@pytest.fixture(scope="module", params=[pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def made(request, tmp_path_factory):
    """(case, place, the tensors of transformers' files, the run that was imported from them)"""
    place = tmp_path_factory.mktemp("t5")
    tensors = saved(request.param, place / "theirs")
    return request.param, place, tensors, imported(place / "theirs", place, "mine")


def test_in_and_out_again_it_is_the_same_to_the_bit(made, capsys) -> None:
    """Both certificates pass, the experiment knows how targets begin, and the export holds what was read."""
    case, place, tensors, run = made
    settings = serialization.load(run.config)
    assert settings.model.kind == "t5" and settings.model.start_token == PAD and settings.model.tied == (case not in UNTIED)
    assert settings.data.examples == Spans(rate=0.15, mean_length=3.0)
    export.main([str(run.path), str(place / "out")])
    for certificate in (run.path / CERTIFICATE, place / "out" / CERTIFICATE):
        table = json.loads(certificate.read_text())
        assert table["relative"] < 1e-5 and (table["texts"], table["equal_texts"]) == (6, 6)
    back = load_file(place / "out" / "model.safetensors")
    if case.startswith("umt5"):
        assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    config, generation = (json.loads((place / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    for table in (config, generation):
        assert [table[f"{name}_token_id"] for name in ("decoder_start", "eos", "pad")] == [PAD, END, PAD]
    again, words = AutoModelForSeq2SeqLM.from_pretrained(place / "out"), AutoTokenizer.from_pretrained(place / "out")
    first = again.generate(words(SOURCES[0], return_tensors="pt").input_ids, max_new_tokens=TOKENS)[0, 1:].tolist()
    assert first == their_ids(case, 1)[0]  # by the settings in the folder alone
    said = capsys.readouterr().out
    assert ("tie_word_embeddings = False after from_pretrained" in said) == (case in UNTIED)
    assert "which the tokenizer does not add" not in said


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_writes_what_transformers_does(made, beams, capsys) -> None:
    case, _, _, run = made
    found = ids_of(run.path, capsys, "--beams", str(beams))
    assert found == their_ids(case, beams) and len({tuple(ids) for ids in found}) == len(SOURCES)


def test_generation_config_says_how_targets_begin(tmp_path) -> None:
    """Before config.json, as in transformers; a token that the model does not have is refused."""
    words, model = Mock(end_of_text=END), t5(model={"vocab_size": VOCAB, "start_token": 7})
    for start, expected in ((9, 9), (END, None), (None, 7)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": start}))
        assert with_start(model.model, tmp_path, words).start_token == expected
    for start in (VOCAB, -1, [9], "9"):
        (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": start}))
        assert "which is not an id below vocab_size = 300" in sentence(lambda: with_start(model.model, tmp_path, words))


def test_texts_that_differ_fail_the_certificate(tmp_path, monkeypatch, capsys) -> None:
    """Where all logits are equal; nothing is left behind."""
    saved("t5 1.1", tmp_path / "theirs")
    right = PairParity._greedy
    monkeypatch.setattr(PairParity, "_greedy", lambda self, decoder, source: right(self, decoder, source)[:-1] + [PAD])
    with pytest.raises(SystemExit):
        imported(tmp_path / "theirs", tmp_path, "mine")
    said = capsys.readouterr().out
    assert "parity   FAILED · " in said and "· 3 of 6 texts equal" in said
    assert not list((tmp_path / "runs").iterdir()) and not (tmp_path / "tree" / "experiments" / "mine").exists()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_tensor_ranks_write_what_transformers_does(made, beams, capsys) -> None:
    case, _, _, run = made
    assert ids_of(run.path, capsys, "--beams", str(beams), "--tensor", "2") == their_ids(case, beams)
