"""Tokenizers that make much of little text are refused from their tables alone; real ones are not."""

from pathlib import Path

import pytest

from parallel.errors import Mistake
from research.data import tokenizer_costs

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
REAL = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES, {"type": "NFKC"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"}},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}]},
    "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {"a": 0}},
    "added_tokens": [{"content": "<|end|>", "id": 0}],
}


def double(times: int) -> dict:
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * times}


def test_a_real_tokenizer_passes():
    tokenizer_costs.check(REAL, Path("t"))
    tokenizer_costs.check(REAL | {"normalizer": double(9)}, Path("t"))  # 512 bytes of one


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"normalizer": double(10)}, "its normalizer makes up to 1,024 bytes of one, more than 1,000"),
        ({"normalizer": SPACES | {"content": "x" * 1001}}, "makes up to 1,001 bytes"),
        ({"normalizer": SPACES | {"pattern": {"Regex": ""}, "content": "x" * 1000}}, "makes up to 1,001 bytes"),
        ({"decoder": {"type": "Sequence", "decoders": double(10)["normalizers"]}}, "its decoder makes up to 1,024 bytes"),
        ({"pre_tokenizer": {"pattern": {"Regex": "(a{1,1000}){101}"}}}, "repeats 1.01e.05 times, more than 100,000"),
        ({"pre_tokenizer": [{"pattern": {"Regex": "a" * 20_001}}]}, "has 20,001 characters, more than 20,000"),
        ({"pre_tokenizer": {"pattern": {"Regex": "(a{ 7 , 1000 }){ , 101 }"}}}, "repeats 1.01e.05 times, more than 100,000"),
        ({"pre_tokenizer": [{"Regex": "a"}] * 1001}, "has 1,001 patterns, more than 1,000"),
        ({"pre_tokenizer": [{"Regex": "a" * 20_000}] * 6}, "its patterns have 120,000 characters, more than 100,000"),
        ({"model": {"continuing_subword_prefix": "x" * 1001}}, "continuing_subword_prefix has 1,001 characters"),
        ({"added_tokens": [{"content": "x"}] * 32_769}, "has 32,769 added tokens, more than 32,768"),
        ({"post_processor": {"processors": [{"single": [{}] * 900, "pair": [{}] * 101}]}}, "its post_processor has 1,001 pieces"),
        ({"added_tokens": [{"content": "x" * 2**20}] * 9}, "its added tokens have 9,437,184 characters"),
    ],
)
def test_what_makes_much_of_little_is_named(part: dict, words: str):
    with pytest.raises(Mistake, match=words):
        tokenizer_costs.check(REAL | part, Path("t"))
