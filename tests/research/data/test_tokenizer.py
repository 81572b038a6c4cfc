"""Byte-level BPE: lossless, deterministic, and for GPT-2's tables equal to transformers' own tokenizer."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.data import documents, special_tokens, tokenizer, tokenizer_file, tokenizer_processes

VAL = "builtin:state_of_the_union/val"


@pytest.fixture(scope="module")
def speeches():
    return list(documents.documents(VAL, ROOT))


@pytest.fixture(scope="module")
def small(speeches, tmp_path_factory):
    return tokenizer.trained("builtin:bpe-1000", speeches, "digest", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["small", "gpt2"])
def either(request, small):
    return small if request.param == "small" else tokenizer.gpt2()


def strange_texts(count=200):
    """Any code point that UTF-8 can hold, in random order and in runs of whitespace, letters, digits and apostrophes."""
    draw = random.Random(5)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    common = " \n\t\r'sS1é猫\u00a0\u2028\x00\x1c\x85"
    for _ in range(count):
        yield "".join(draw.choice(common) if draw.random() < 0.6 else chr(draw.choice(points)) for _ in range(draw.randrange(60)))


def test_round_trip_of_any_text(either):
    for text in [*strange_texts(), "", "<|endoftext|>", "  <|endoftext|>x", "e\u0301 ﬁ \U0010ffff"]:
        assert either.decode(either.encode(text)) == text


def test_batch_equals_one_by_one(either, speeches):
    texts = [speeches[0][:5000], "", "a b", *strange_texts(20)]
    assert either.encode_batch(texts) == [either.encode(text) for text in texts]


def test_text_never_becomes_end_of_text(either):
    assert either.end_of_text not in either.encode("a<|endoftext|>b")
    assert either.decode([*either.encode("a"), either.end_of_text, *either.encode("b")]) == "a<|endoftext|>b"


def test_ids_beyond_the_table_decode_to_nothing(either):
    assert either.decode([*either.encode("a"), either.vocab_size + 7]) == "a"


def test_pieces_change_nothing(either, speeches):
    """A document tokenized in pieces has the ids of the whole, wherever the cuts fall."""
    for text in [speeches[1][:20_000], *strange_texts(40), "it's  two\n\n three \n x", "nospace" * 30]:
        for size in (1, 2, 3, 10, 1000):
            parts = list(tokenizer.pieces(text, size))
            assert "".join(parts) == text
            assert [i for part in parts for i in either.encode(part)] == either.encode(text)
    assert len(list(tokenizer.pieces("ab " * 100, 10))) > 20


def test_gpt2_equals_transformers(speeches):
    transformers = pytest.importorskip("transformers")
    folder = documents.FOLDER / "gpt2"
    theirs = transformers.GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    ours = tokenizer.gpt2()
    assert (ours.vocab_size, ours.end_of_text) == (len(theirs), theirs.eos_token_id) == (50257, 50256)
    for text in [speeches[0], *strange_texts()]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.encode("Hello world") == [15496, 995]  # as published with GPT-2


def test_the_table_is_bytes_then_merges(small):
    assert (small.vocab_size, small.end_of_text) == (1000, 0)
    found = json.loads(small.backend.to_str())
    assert sorted(found["model"]["vocab"].values()) == list(range(1000))
    assert all(len(token) == 1 for token, i in found["model"]["vocab"].items() if 1 <= i <= 256)
    assert len(found["model"]["merges"]) == 1000 - 257


def test_little_text_gives_fewer_tokens_than_asked(tmp_path):
    found = tokenizer.trained("builtin:bpe-5000", ["abc abc"], "digest", tmp_path)
    assert 257 < found.vocab_size < 270


TRAIN = """
import hashlib, pathlib
from research.data import documents, special_tokens, tokenizer, tokenizer_file, tokenizer_processes
text = tokenizer.train_bpe(documents.documents("builtin:state_of_the_union/val", pathlib.Path()), 2000)
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_training_is_deterministic_across_processes(speeches):
    """Another hash seed, another number of threads, another process: the same bytes."""
    found = {hashlib.sha256(tokenizer.train_bpe(speeches, 2000).encode()).hexdigest()}
    for seed, threads in (("1", "1"), ("3", "5")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", TRAIN], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    assert len(found) == 1


def refuse_to_train():
    raise AssertionError("trained although it is cached")
    yield


def test_cached_by_digest_and_size(tmp_path, speeches):
    first = tokenizer.trained("builtin:bpe-300", speeches[:1], "a" * 64, tmp_path)
    again = tokenizer.trained("builtin:bpe-300", refuse_to_train(), "a" * 64, tmp_path)
    assert again.fingerprint == first.fingerprint and again.encode("speech") == first.encode("speech")
    for name, source in (("builtin:bpe-301", "a" * 64), ("builtin:bpe-300", "b" * 64)):
        with pytest.raises(AssertionError, match="although"):
            tokenizer.trained(name, refuse_to_train(), source, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_broken_cached_file_is_made_again(tmp_path, speeches):
    first = tokenizer.trained("builtin:bpe-300", speeches[:1], "digest", tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(path.read_bytes()[:1000])
    assert tokenizer.trained("builtin:bpe-300", speeches[:1], "digest", tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize(("name", "size"), [("builtin:gpt2", 50257), ("builtin:bpe-8192", 8192), ("builtin:bpe-257", 257)])
def test_declared_sizes(name, size):
    assert tokenizer.declared_vocab_size(name) == size


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:bpe-256", ["smaller than 257"]),
        ("builtin:bpe-", ["is not known"]),
        ("builtin:bpe--5", ["is not known"]),
        ("builtin:bpe-²", ["is not known"]),
        ("builtin:gpt3", ["builtin:gpt2 is meant?"]),
        ("gpt2", ["is not known", "builtin:bpe-8192"]),
    ],
)
def test_unknown_names_are_refused(name, words):
    with pytest.raises(Mistake) as caught:
        tokenizer.declared_vocab_size(name)
    assert all(word in str(caught.value) for word in [*words, f"data.tokenizer = {name!r}", "→"]), str(caught.value)


@pytest.mark.parametrize(
    "base", ["builtin:bpe-300", "builtin:bytes", "builtin:chars", pytest.param("builtin:gpt2", marks=pytest.mark.slow)]
)
def test_special_tokens_of_a_name_follow_the_others_and_no_text_becomes_one(base, tmp_path):
    """Their letters are in the text that the tokenizer is made from, many times, and in what it encodes; the file keeps them."""
    text = "<fim_prefix>a<fim_suffix> b <fim_middle>\n<mask>x<extra_id_7>" * 40
    name, words = f"{base}+fim+mask", (*special_tokens.FIM, *special_tokens.MASK)
    plain, own = (
        tokenizer.trained(one, [text], "digest", tmp_path) if tokenizer.is_made_from_text(one) else tokenizer.fixed(one)
        for one in (base, name)
    )
    assert own.vocab_size == plain.vocab_size + 4 and own.fingerprint != plain.fingerprint and own.end_of_text == plain.end_of_text
    assert [own.backend.token_to_id(word) for word in words] == [*range(plain.vocab_size, own.vocab_size)]
    assert own.encode(text) == plain.encode(text) and own.decode(own.encode(text)) == text
    assert own.decode([own.vocab_size - 4, *own.encode("ab"), own.vocab_size - 1]) == "<fim_prefix>ab<mask>"
    if base != "builtin:chars":
        assert tokenizer.declared_vocab_size(name) == tokenizer.declared_vocab_size(base) + 4

    # as `prepare` writes it, with and without the name by which it is known
    (tmp_path / "tokenizer.json").write_text(
        tokenizer.made_from(name, [text]) if tokenizer.is_made_from_text(name) else own.backend.to_str()
    )
    for read in (tokenizer_file.load("tokenizer.json", tmp_path), tokenizer_processes.open_tokenizer(name, tmp_path / "tokenizer.json")):
        assert (read.vocab_size, read.end_of_text) == (own.vocab_size, own.end_of_text)
        assert read.encode(text) == own.encode(text) and [read.backend.token_to_id(word) for word in words] == [
            *range(plain.vocab_size, own.vocab_size)
        ]


def test_a_trained_tokenizer_is_kept_once_whatever_special_tokens_its_names_add(tmp_path):
    sizes = []
    for name in ("builtin:bpe-300+fim", "builtin:bpe-300", "builtin:bpe-300+spans"):
        found = tokenizer.trained(name, ["some text " * 20], "digest", tmp_path)
        assert tokenizer.kept(name, "digest", tmp_path).fingerprint == found.fingerprint
        sizes.append(found.vocab_size)
    assert sizes == [sizes[1] + 3, sizes[1], sizes[1] + 100]
    assert [path.name for path in tmp_path.glob("*.json")] == ["bpe-300-digest-v1.json"]


def test_special_tokens_that_are_not_known_are_refused():
    for name, words in (
        ("builtin:bpe-300+fin", "'fin' → use builtin:bpe-300+fim"),
        ("builtin:gpt2+", "''"),
        ("builtin:gpt3+fim", "builtin:gpt2 is meant?"),
    ):
        with pytest.raises(Mistake) as caught:
            tokenizer.declared_vocab_size(name)
        assert words in str(caught.value) and f"data.tokenizer = {name!r}" in str(caught.value) and "→" in str(caught.value)
