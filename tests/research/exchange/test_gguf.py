"""GGUF files: imports of files by llama.cpp's own writer, one-sentence errors for damaged files, and tokenizers.

A tokenizer is compared with one made of the same vocabulary, for the pre-tokenizers that llama.cpp names.
"""

import struct
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.conversion import mapping, read_config
from models.conversion.gguf import llama3_factors
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from research.cli import export
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.exchange import source
from research.exchange.gguf import GGUFFile, convert_tokenizer
from tests.research.helpers.gguf_files import Q8_0, tokens_and_merges, unpacked, write
from tests.research.helpers.hf_models import imported, their_model
from tests.research.helpers.launches import ROOT

CASE = "llama, grouped"


def weights(path: Path) -> dict[str, torch.Tensor]:
    with GGUFFile(path) as opened:
        model = read_config.settings(opened.config)
        plan = mapping.plan(model, opened.family, opened.shapes)
        opened.check([key for link in plan.parameters for key in link.keys])
        return {link.name: tensor for link, tensor in zip(plan.parameters, source.weights(opened, plan, model), strict=True)}


def expected(case: str) -> dict[str, torch.Tensor]:
    theirs = their_model(case)
    return mapping.from_hf(read_config.settings(theirs.config), theirs.config.model_type, theirs.state_dict())


@pytest.mark.parametrize("case", [CASE, "llama 3, tied", "qwen2", "qwen3, one kv head, wide"])
def test_weights_and_settings_are_those_of_the_model_that_was_converted(case, tmp_path):
    """Llama 3's scaling is in no field but in a tensor, which only a model of its original length has: left out here."""
    found, true = weights(write(tmp_path / "m.gguf", case)), expected(case)
    assert found.keys() == true.keys() and all(torch.equal(found[name], tensor) for name, tensor in true.items())
    with GGUFFile(tmp_path / "m.gguf") as opened:
        ours, theirs = read_config.settings(opened.config), read_config.settings(their_model(case).config)
        changes = {name: getattr(theirs, name) for name in type(theirs).model_fields if getattr(ours, name) != getattr(theirs, name)}
        assert set(changes) <= {"rotary_scaling", "rotary_factor", "rotary_low_factor", "rotary_high_factor", "rotary_original_length"}


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_packing_that_can_be_written_here_is_read(name, tmp_path):
    """All matrices, and no vector, are what the package's own two functions leave of them; q and k in llama.cpp's order of rows."""
    packing = gguf.GGMLQuantizationType[name]
    found, true = weights(write(tmp_path / "m.gguf", CASE, packing)), expected(CASE)
    for key, tensor in found.items():
        matrix = tensor.dim() == 2
        assert torch.equal(tensor, unpacked(true[key], packing) if matrix else true[key]), key
        assert not matrix or not torch.equal(tensor, true[key])


@pytest.mark.parametrize("packing", [Q8_0], ids=["Q8_0"])
def test_a_packed_file_is_imported_with_a_certificate_and_exported(packing, tmp_path, capsys):
    """Its numbers are the unpacked ones; transformers' own reading of the file agrees, and so does what is exported."""
    run = imported(write(tmp_path / "m.gguf", CASE, packing), tmp_path, "mine")
    assert "import m.gguf · GGUF llama · " in (said := capsys.readouterr().out) and "parity   passed" in said
    true = expected(CASE)
    with Reader(latest(run.checkpoints)) as reader:
        assert torch.equal(reader.read("blocks.1.mlp.down.weight"), unpacked(true["blocks.1.mlp.down.weight"], packing))
        assert torch.equal(reader.read("final_norm.weight"), true["final_norm.weight"])
        assert not torch.equal(reader.read("embedding.weight"), true["embedding.weight"])
    export.main([str(run.path), str(tmp_path / "out")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    words = load_tokenizer(serialization.load(run.config).data, ROOT)
    text = "We, the people of 1787 — \n\n and more."
    assert tokenizer(text).input_ids == words.encode(text) and words.decode(words.encode(text)) == text
    assert (tokenizer.eos_token, tokenizer.bos_token, words.end_of_text) == ("<|end|>", "<|begin|>", 0)
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_qwen3_is_imported_with_a_certificate(tmp_path, capsys):
    """One kv head, heads wider than hidden / heads, norms of q and k; transformers reads the same file."""
    run = imported(write(tmp_path / "m.gguf", "qwen3, one kv head, wide"), tmp_path, "mine")
    assert "import m.gguf · GGUF qwen3 · " in (said := capsys.readouterr().out) and "parity   passed" in said
    assert (serialization.load(run.config).model.head_size, serialization.load(run.config).model.qk_norm) == (16, True)


def test_llama_3_s_factors_are_read_from_their_tensor(tmp_path):
    """Heads of 8 at Llama 3's base: the slowest pair has the whole factor."""
    factors = {"rope_freqs.weight": llama3_factors(5e5, 8, 8.0).float()}
    run = imported(write(tmp_path / "m.gguf", CASE, fields={"llama.rope.freq_base": 5e5}, more=factors), tmp_path, "mine")
    model = serialization.load(run.config).model
    assert (model.rotary_scaling, model.rotary_factor, model.rotary_base, model.rotary_original_length) == ("llama3", 8.0, 5e5, 8192)


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), "is not a whole GGUF file"),
    "another format": (lambda p: p.write_bytes(b"x" * 1000), "is not a whole GGUF file"),
    "half": (lambda p: cut(p, 0.5), "is not a whole GGUF file"),
    "the end is missing": (lambda p: cut(p, 0.999), "is not a whole GGUF file"),
    "endless fields": (lambda p: overwrite(p, 16, struct.pack("<Q", 2**62)), "is not a whole GGUF file"),
    "endless tensors": (lambda p: overwrite(p, 8, struct.pack("<Q", 2**62)), "is not a whole GGUF file"),
    "a name without end": (lambda p: overwrite(p, 24, struct.pack("<Q", 2**62)), "is not a whole GGUF file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "it is a folder, not a file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence(what, tmp_path):
    act, words = DAMAGE[what]
    act(write(tmp_path / "m.gguf"))
    with pytest.raises(Mistake, match=words) as caught:
        weights(tmp_path / "m.gguf")
    assert "→" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_byte_of_the_header_may_be_wrong(tmp_path):
    """Whatever a flipped byte makes of it: a Mistake or a model, never another error."""
    path = write(tmp_path / "m.gguf")
    data = path.read_bytes()
    refused = 0
    for offset in [*range(4, 1200, 23), *range(9000, 11_500, 97)]:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            weights(path)
        except Mistake as mistake:
            refused += 1
            assert "→" in str(mistake) and "\n" not in str(mistake)
    assert refused > 20


OTHERS = {
    "architecture": ({"general.architecture": "phi3"}, {}, "general.architecture = 'phi3' has no counterpart"),
    "split": ({"split.count": 3}, {}, "is one of 3 files → join them first"),
    "experts": ({"llama.expert_count": 8}, {}, "mixture of experts"),
    "left over": ({}, {"blk.0.attn_q_norm.weight": torch.ones(8)}, "hold 1 tensors that this model lacks, the first is blk.0.attn_q_norm"),
    "not finite": ({}, {"blk.0.attn_norm.weight": torch.full((64,), torch.nan)}, "blk.0.attn_norm.weight holds values that are not finite"),
    "factors": ({}, {"rope_freqs.weight": torch.ones(3)}, "rope_freqs.weight are not Llama 3.1's"),
    "whole numbers": (
        {},
        {"output_norm.weight": torch.ones(64, dtype=torch.int8)},
        "output_norm.weight is packed as I8, which cannot be unp",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_refused_by_name(what, tmp_path):
    fields, more, words = OTHERS[what]
    with pytest.raises(Mistake, match=words):
        weights(write(tmp_path / "m.gguf", fields=fields, more=more))


TEXT = "We, the people — don't: 1787 12345\n\n\n  of   the United.\n"


def converted(tmp_path, **fields):
    with GGUFFile(write(tmp_path / "m.gguf", fields={key.replace("__", "."): value for key, value in fields.items()})) as file:
        return convert_tokenizer(file)


def plain(pre_tokenizer, **settings) -> Tokenizer:
    tokens, merges = tokens_and_merges()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    found = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs, **settings))
    found.pre_tokenizer, found.decoder = pre_tokenizer, decoders.ByteLevel()
    return found


def ids(backend, text=TEXT):
    return backend.encode(text, add_special_tokens=False).ids


def test_gpt_2_s_way(tmp_path):
    backend, told = converted(tmp_path)
    assert ids(backend) == ids(plain(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    assert backend.decode(ids(backend)) == TEXT
    assert told == {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "unk_token": None,
        "pad_token": None,
        "chat_template": "{{ messages }}",
    }
    assert ids(backend, "a<|end|>b")[1] == 0  # the control token is one, until data.tokenizer takes markers for text


def test_digit_by_digit(tmp_path):
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend, _ = converted(tmp_path, tokenizer__ggml__pre="smollm")
    assert ids(backend) == ids(plain(digits))


def test_llama_3_s_way(tmp_path):
    backend, _ = converted(tmp_path, tokenizer__ggml__pre="llama-bpe", tokenizer__ggml__add_bos_token=True)
    assert backend.model.ignore_merges and backend.decode(ids(backend)) == TEXT
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in 12345.\n\nA")]
    assert pieces == ["in", "Ġ", "123", "45", ".ĊĊ", "A"]
    assert backend.encode("We").ids == [1, *ids(backend, "We")]  # who asks for special tokens gets the first


def test_sentencepiece(tmp_path):
    """Llama 2's kind: spaces are letters, and merges follow from the scores."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    file = type("File", (), {})()
    file.path, file.metadata = tmp_path, {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    arrays = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
    }
    file.array = arrays.get
    backend, told = convert_tokenizer(file)
    assert (told["bos_token"], told["eos_token"]) == ("<s>", "</s>")
    found = backend.encode("ab ab", add_special_tokens=False)
    assert found.tokens == ["▁ab", "▁ab"] and backend.decode(found.ids) == "ab ab"
    assert backend.encode("é", add_special_tokens=False).tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert backend.encode("ab").tokens == ["<s>", "▁ab"]  # llama.cpp's default for this kind


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"tokenizer__ggml__pre": "viking"},
            "tokenizer.ggml.pre = 'viking', a way to cut text, has no counterpart here → name the model's tok",
        ),
        ({"tokenizer__ggml__pre": "default"}, "tokenizer.ggml.pre = 'default'"),
    ],
)
def test_another_way_is_refused_by_name(fields, words, tmp_path):
    with pytest.raises(Mistake, match=words):
        converted(tmp_path, **fields)


@pytest.mark.parametrize(
    "change", [{"tokenizer.ggml.model": "rwkv"}, {"tokenizer.ggml.model": None}, {"tokens": 3}, {"merges": ["a"]}, {"merges": 3}]
)
def test_a_broken_one_is_one_sentence(change, tmp_path):
    with GGUFFile(write(tmp_path / "m.gguf")) as file:
        file.metadata.update({key: value for key, value in change.items() if key.startswith("tokenizer")})
        whole = file.array
        file.array = lambda key: change.get(key.removeprefix("tokenizer.ggml."), whole(key))
        with pytest.raises(Mistake, match="→ name the model's tokenizer.json: --tokenizer PATH"):
            convert_tokenizer(file)
