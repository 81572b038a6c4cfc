"""The tokenizer in a GGUF file: against the vocabulary it was made of, and the ways to cut text that llama.cpp names."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from parallel.errors import Mistake
from research.gguf_reader import File
from research.gguf_tokenizer import convert
from tests.research.gguf_files import tokens_and_merges, write

TEXT = "We, the people — don't: 1787 12345\n\n\n  of   the United.\n"


def converted(tmp_path, **fields):
    with File(write(tmp_path / "m.gguf", fields={key.replace("__", "."): value for key, value in fields.items()})) as file:
        return convert(file)


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
    backend, told = convert(file)
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
    with File(write(tmp_path / "m.gguf")) as file:
        file.metadata.update({key: value for key, value in change.items() if key.startswith("tokenizer")})
        whole = file.array
        file.array = lambda key: change.get(key.removeprefix("tokenizer.ggml."), whole(key))
        with pytest.raises(Mistake, match="→ name the model's tokenizer.json: --tokenizer PATH"):
            convert(file)
