"""From text to stores: right, once, atomically, and by real processes that all start at the same moment."""

import contextlib
import fcntl
import select
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from parallel.errors import Mistake
from research import ROOT
from research.data import documents, prepare, text_stores, tokenizer
from research.data.run_tokenizer import load_tokenizer
from research.data.token_store import TokenStore

PATIENCE = 60


def noting(said):
    """A Progress that appends what begins to `said`, and after it how many characters were done."""

    @contextlib.contextmanager
    def progress(what):
        done = []
        said.append(what)
        yield done.append
        said.append(sum(done))

    return progress


def files(folder):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def test_stores_hold_the_documents_each_followed_by_end_of_text(settings, tmp_path):
    found = prepare.load(settings, tmp_path, 300)
    for spec, split in ((settings.train, found.train), (settings.validation, found.validation)):
        texts = list(documents.documents(spec, tmp_path))
        expected = [i for text in texts for i in [*found.tokenizer.encode(text), found.tokenizer.end_of_text]]
        assert split.tokens.tolist() == expected
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        cut = np.split(split.tokens, split.document_offsets()[1:-1])
        assert [found.tokenizer.decode(ids[:-1]) for ids in cut] == texts


def test_the_tokenizer_has_seen_the_training_text_only(settings, tmp_path):
    found = prepare.load(settings, tmp_path, 300).tokenizer
    texts = list(documents.documents(settings.train, tmp_path))
    assert found.backend.to_str() == tokenizer._wrap("", type(found.backend).from_str(tokenizer.train_bpe(texts, 300)), "").backend.to_str()


def test_a_second_load_writes_nothing_and_says_nothing(settings, tmp_path):
    said = []
    first = prepare.load(settings, tmp_path, 300, noting(said))
    sizes = [sum(map(len, documents.documents(spec, tmp_path))) for spec in (settings.train, settings.validation)]
    assert [str(word).split()[0] for word in said] == ["training", str(sizes[0]), "tokenizing", str(sizes[0]), "tokenizing", str(sizes[1])]
    before = files(tmp_path / "cache")
    again = prepare.load(settings, tmp_path, 300, noting(said))
    assert len(said) == 6 and files(tmp_path / "cache") == before and again.fingerprint == first.fingerprint
    assert load_tokenizer(settings, tmp_path, noting(said)).fingerprint == first.tokenizer.fingerprint and len(said) == 6


def test_long_documents_and_many_small_ones_are_grouped_without_a_trace(settings, tmp_path, lines, monkeypatch):
    settings.validation = lines("long.jsonl", ["tiny", "word and \n\nword " * 50, "", "x" * 200, "end "])
    whole = prepare.load(settings, tmp_path, 300).validation.tokens.tolist()
    monkeypatch.setattr(text_stores, "GROUP", 37)
    monkeypatch.setattr(tokenizer, "pieces", lambda text: pieces(text, 11))
    settings.cache = "other"
    assert prepare.load(settings, tmp_path, 300).validation.tokens.tolist() == whole


pieces = tokenizer.pieces


def test_fingerprint_follows_text_and_tokenizer(settings, tmp_path, lines):
    prints = {prepare.load(settings, tmp_path, 300).fingerprint}
    other = types.SimpleNamespace(**vars(settings) | {"validation": lines("v2.jsonl", ["another"])})
    prints.add(prepare.load(other, tmp_path, 300).fingerprint)
    smaller = types.SimpleNamespace(**vars(settings) | {"tokenizer": "builtin:bpe-280"})
    prints.add(prepare.load(smaller, tmp_path, 300).fingerprint)
    assert len(prints) == 3
    lines("train.jsonl", ["the file changed under its old name"] * 9)
    changed = prepare.load(settings, tmp_path, 300)
    assert changed.fingerprint not in prints and changed.train.num_documents == 9
    elsewhere = types.SimpleNamespace(**vars(settings) | {"cache": str(tmp_path / "absolute")})
    assert prepare.load(elsewhere, tmp_path, 300).fingerprint == changed.fingerprint


MIXED = ["the cat — 猫猫 sat 🐈 on it", "", "é" * 9, "🐈", "the end"]
"""Characters of one to four bytes, which this small a tokenizer cuts into as many tokens."""


def test_the_first_tokens_have_the_bytes_of_their_whole_characters(settings, tmp_path, lines):
    """At every count. A letter of GPT-2's alphabet is one byte: so many bytes of the text are cut off, and decoded without a rest."""
    settings.validation = lines("mixed.jsonl", MIXED)
    found = prepare.load(settings, tmp_path, 300)
    store, words = found.validation, found.tokenizer
    expected, earlier, size, texts = [0], 0, 0, iter(MIXED)
    text = next(texts).encode()
    for token in store.tokens.tolist():
        if token == words.end_of_text:
            earlier, size, text = earlier + len(text), 0, next(texts, "").encode()
        else:
            size += len(words.backend.id_to_token(token))
        expected.append(earlier + len(text[:size].decode("utf-8", errors="ignore").encode()))
    assert len(store.tokens) > 50 and expected[-1] == store.num_bytes == sum(len(text.encode()) for text in MIXED)
    assert [prepare.leading_bytes(store, words, count) for count in range(len(expected))] == expected


def test_what_a_validation_predicts_is_bounded_and_never_nothing(settings, tmp_path, lines):
    found = prepare.load(settings, tmp_path, 300)
    store = found.validation
    there = store.num_tokens - 1
    for bound, tokens in ((0, there), (5, 5), (there - 1, there - 1), (there, there), (10**9, there)):
        text = prepare.held_out_texts(found, bound)[0]
        assert text == (store, tokens, prepare.leading_bytes(store, found.tokenizer, tokens + 1), prepare.SHARED)
    assert prepare.held_out_texts(found, 0)[0].num_bytes == store.num_bytes
    settings.validation, settings.tokenizer = lines("one.jsonl", ["", "a"]), "builtin:bpe-300"
    alone = prepare.load(settings, tmp_path, 300)
    alone.validation.num_tokens = 1
    with pytest.raises(Mistake, match="nothing to predict → use more text"):
        prepare.held_out_texts(alone, 0)


def test_a_copy_of_the_training_text_is_not_held_out(settings, tmp_path):
    prepare.refuse_same_text(settings, prepare.load(settings, tmp_path, 300))
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    settings.validation = "copy.jsonl"
    with pytest.raises(Mistake, match=r"'copy.jsonl' has the same content as data.train = 'train.jsonl' → name a text"):
        prepare.refuse_same_text(settings, prepare.load(settings, tmp_path, 300))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_cached_store_that_is_not_whole_is_made_again(settings, tmp_path, suffix):
    first = prepare.load(settings, tmp_path, 300)
    path = first.train.prefix.with_name(first.train.prefix.name + suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    prepare.load(settings, tmp_path, 300)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train", "nowhere.txt", ["data.train = 'nowhere.txt'", "does not exist"]),
        ("validation", "builtin:sotu/val", ["data.validation = 'builtin:sotu/val'"]),
        ("tokenizer", "bpe-8192", ["data.tokenizer = 'bpe-8192'"]),
        ("tokenizer", "builtin:bpe-301", ["model.vocab_size = 300", "301 tokens", "set model.vocab_size = 301"]),
        ("tokenizer", "builtin:gpt2", ["set model.vocab_size = 50257"]),
    ],
)
def test_check_refuses_before_anything_is_read(settings, tmp_path, field, value, words):
    setattr(settings, field, value)
    for refuse in (prepare.check, prepare.load):
        with pytest.raises(Mistake) as caught:
            refuse(settings, tmp_path, 300)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_larger_model_vocabulary_is_fine(settings, tmp_path):
    assert prepare.load(settings, tmp_path, 1000).tokenizer.vocab_size == 300


def test_gpt2_needs_no_training(settings, tmp_path):
    settings.tokenizer, said = "builtin:gpt2", []
    found = prepare.load(settings, tmp_path, 50257, noting(said))
    assert found.tokenizer.end_of_text == 50256 == found.train.tokens[-1]
    assert not any("training" in str(message) for message in said)


def test_a_cache_that_cannot_be_used_is_named(settings, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(Mistake, match=r"data.cache = 'cache' cannot be used .* → name a folder"):
        prepare.load(settings, tmp_path, 300)


def test_a_broken_line_leaves_no_half_made_file(settings, tmp_path):
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(Mistake, match="train.jsonl, line 21 is not JSON"):
        prepare.load(settings, tmp_path, 300)
    names = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert names == {"text"}, "only the digest of the text"


LOAD = """
import contextlib, pathlib, sys, time, types
from research.data import load
data = types.SimpleNamespace(train="train.jsonl", validation="val.jsonl", tokenizer="builtin:bpe-400", cache="cache")
root = pathlib.Path(sys.argv[1])
(root / f"ready{sys.argv[2]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
@contextlib.contextmanager
def progress(message):
    print("did", message)
    yield lambda characters: None
found = load(data, root, 400, progress)
print(found.fingerprint, int(found.train.tokens.astype("int64").sum()), found.validation.num_bytes)
"""


def test_all_ranks_at_once_one_does_the_work(tmp_path, lines):
    lines("train.jsonl", list(documents.documents("builtin:state_of_the_union/val", ROOT)))
    lines("val.jsonl", ["the end"])
    ranks = [start(LOAD, tmp_path, rank) for rank in range(3)]
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("ready*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [finished(rank).splitlines() for rank in ranks]
    work = sorted(line for lines_ in said for line in lines_ if line.startswith("did") and "waiting for another" not in line)
    assert work == ["did tokenizing train.jsonl", "did tokenizing val.jsonl", "did training builtin:bpe-400 on train.jsonl"]
    assert len({lines_[-1] for lines_ in said}) == 1
    assert not list((tmp_path / "cache").glob(".*"))


HOLD = """
import pathlib, sys, time
from parallel.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    lock = tmp_path / "x.lock"
    holder, waiter = start(HOLD, lock), None
    try:
        assert holder.stdout.readline() == "held\n"
        waiter = start(HOLD, lock)
        assert select.select([waiter.stdout], [], [], 1.0)[0] == []  # it waits
        holder.send_signal(signal.SIGKILL)
        assert waiter.stdout.readline() == "held\n"
    finally:
        for process in filter(None, (holder, waiter)):
            process.kill()
            process.communicate()


def test_where_the_file_system_has_no_locks_work_goes_on(settings, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert prepare.load(settings, tmp_path, 300).train.num_documents == 20


@pytest.mark.slow
def test_the_builtin_corpus_gives_the_recorded_numbers(tmp_path):
    """Ten megabytes in seconds; the tokenizer's bytes are pinned, so that another library version cannot change them unseen."""
    names = ("builtin:state_of_the_union/train", "builtin:state_of_the_union/val")
    data = types.SimpleNamespace(train=names[0], validation=names[1], tokenizer="builtin:bpe-8192", cache="c")
    found = prepare.load(data, tmp_path, 8192)
    assert (found.train.num_tokens, found.validation.num_tokens) == (2_095_431, 70_813)
    assert (found.train.num_bytes, found.validation.num_bytes) == (10_275_792, 307_947)
    assert found.tokenizer.fingerprint == "265dd50d3d95fdeede35bbd100b93744fb04eeaa9952093983ef98e1865cb17b"
    assert isinstance(found.train, TokenStore) and found.train.tokens.dtype == np.uint16


def test_the_builtin_validation_split_gives_the_recorded_numbers(tmp_path):
    """The same on 300 kilobytes: a tokenizer trained on the validation split and the store of that split are pinned."""
    name = "builtin:state_of_the_union/val"
    found = prepare.load(types.SimpleNamespace(train=name, validation=name, tokenizer="builtin:bpe-8192", cache="c"), tmp_path, 8192)
    assert (found.validation.num_tokens, found.validation.num_bytes) == (63_495, 307_947)
    assert found.tokenizer.fingerprint == "ce1a70e9b2ff8b92f2be3a9a08cc781357eb31d4a76556c9ad45dd3214ae4cf7"
    assert isinstance(found.train, TokenStore) and found.train.tokens.dtype == np.uint16


def start(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    return out
