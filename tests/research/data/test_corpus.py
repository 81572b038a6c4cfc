"""Corpora made by `prepare`: read by an independent reader, equal for any number of processes, continued after a kill."""

import json
import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from parallel.errors import Mistake
from research import ROOT
from research.data import corpus, corpus_inputs, corpus_work, random_split, special_tokens, tokenizer, tokenizer_file, tokenizer_processes
from research.data.corpus import Options
from research.data.corpus_inputs import Inputs
from research.data.random_split import Split, shares_of
from research.data.records import silent
from research.data.text_files import Reading
from research.tracking.console import nothing
from tests.research.data.test_tokenizer import strange_texts

SPEARE = ROOT / "data" / "tinyshakespeare" / "input.txt"


def read_store(prefix):
    """The documents of a store, read from the description of Megatron-LM's format: MMIDIDX, lengths, pointers, documents."""
    raw = prefix.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, indices = struct.unpack_from("<QBQQ", raw, 9)
    assert (version, indices) == (1, sequences + 1) and len(raw) == 34 + 12 * sequences + 8 * indices
    dtype = {8: np.uint16, 4: np.int32}[code]
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    pointers = np.frombuffer(raw, np.int64, sequences, 34 + 4 * sequences)
    documents = np.frombuffer(raw, np.int64, indices, 34 + 12 * sequences)
    assert documents.tolist() == list(range(indices))
    ids = np.fromfile(prefix.with_suffix(".bin"), dtype)
    assert len(ids) == lengths.sum()
    starts = pointers // np.dtype(dtype).itemsize
    return [ids[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture
def prepare(tmp_path):
    """prepare(names, tokenizer, …): makes and publishes tmp_path/corpora/mine; returns (its folder, what was warned of)."""

    def run(names, name=tokenizer.BYTES, split="98,1,1", seed=0, workers=1, title="mine", replace=False, reading=None):
        target, warned = tmp_path / "corpora" / title, []
        inputs = Inputs(names, tmp_path, reading or Reading())
        with corpus_work.opened(target, replace) as work:
            options = Options(name, "", split, seed)
            corpus.prepare(work, inputs, options, workers, None, lambda *_: silent(""), warned.append)
            work.publish(replace)
        return target, warned

    return run


@pytest.fixture
def small_sizes(monkeypatch):
    """Parts and groups of a few documents, which may begin in one and end in the next."""
    monkeypatch.setattr(corpus_inputs, "PIECE", 20)
    monkeypatch.setattr(corpus, "PART_TOKENS", 3000)
    monkeypatch.setattr(corpus_inputs, "GROUP", 1000)


TEXTS = [text for text in strange_texts(200) if text]


def stores_of(folder, names=("train", "val", "test")):
    return {name: read_store(folder / name) for name in names}


def test_an_independent_reader_finds_every_document_once(tmp_path, lines, prepare, small_sizes):
    """Exact shares, the order of the input in each part, and the bytes of the text in the sidecar."""
    texts = [*TEXTS, *(f"{i} long words " * 150 for i in range(20))]
    lines("a.jsonl", [*texts[:120], ""])
    lines("b.jsonl", texts[120:])
    folder, _ = prepare(["a.jsonl", "b.jsonl"], split="90,5,5")
    stores = stores_of(folder)
    documents = [[*text.encode(), 256] for text in texts]
    where = [next(name for name in stores if document in stores[name]) for document in documents]
    count = len(texts)
    assert [len(stores[name]) for name in stores] == [
        round(0.9 * count),
        round(0.95 * count) - round(0.9 * count),
        count - round(0.95 * count),
    ]
    for name in stores:
        assert stores[name] == [document for document, place in zip(documents, where, strict=True) if place == name]
        facts = json.loads((folder / f"{name}.json").read_text())
        assert facts["bytes"] == sum(len(document) - 1 for document in stores[name]) and facts["documents"] == len(stores[name])
        loaded = tokenizer_file.load(str(folder / "tokenizer.json"), ROOT)
        assert facts["tokenizer_sha256"] == loaded.fingerprint and loaded.decode(stores[name][0][:-1]).encode() == bytes(
            stores[name][0][:-1]
        )
    assert [json.loads(line)["documents"] for line in (folder / "sources.jsonl").read_text().splitlines()] == [120, count - 120]
    assert sorted(path.name for path in (tmp_path / "corpora").iterdir()) == ["mine"]


def test_the_seed_draws_the_held_out_documents(lines, prepare):
    lines("a.jsonl", TEXTS)
    drawn = [stores_of(prepare(["a.jsonl"], seed=seed, title=f"s{n}")[0], ["val"])["val"] for n, seed in enumerate((0, 1, 0))]
    assert drawn[0] == drawn[2] != drawn[1]
    assert len({Split(shares_of("50,50"), 1000, 9999, seed).of_documents(np.arange(1000)).tobytes() for seed in range(20)}) == 20


def test_one_document_is_split_by_position(tmp_path, prepare, small_sizes):
    """nanoGPT's rule: the first int(0.9 n) characters are trained on, and ids are places among the sorted characters."""
    texts = {"text.txt": "To be, or not to be: that is the question.\n" * 91}
    if SPEARE.is_file():
        texts["speare.txt"] = SPEARE.read_text()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        folder, _ = prepare([name], tokenizer.CHARS, "90,10", title=name)
        place = {letter: i for i, letter in enumerate(sorted(set(text)))}
        ids, cut = [place[letter] for letter in text], int(0.9 * len(text))
        assert stores_of(folder, ["train", "val"]) == {"train": [ids[:cut]], "val": [[*ids[cut:], len(place)]]}
        sizes = [json.loads((folder / f"{part}.json").read_text())["bytes"] for part in ("train", "val")]
        assert sizes == [cut, len(text) - cut]
        if name == "speare.txt":
            assert (cut, len(text) - cut, len(place)) == (1_003_854, 111_540, 65)


@pytest.mark.parametrize("name", [tokenizer.BYTES, tokenizer.CHARS, pytest.param("builtin:bpe-300", marks=pytest.mark.slow)])
def test_special_tokens_change_no_id_of_a_text(tmp_path, prepare, name):
    (tmp_path / "a.txt").write_text("a <fim_prefix> b <mask>\n" * 90)
    plain, _ = prepare(["a.txt"], name, "90,10", title="plain")
    folder, _ = prepare(["a.txt"], f"{name}+fim+mask", "90,10", title="more")
    assert stores_of(folder, ["train", "val"]) == stores_of(plain, ["train", "val"])
    before, own = (tokenizer_file.load(str(made / "tokenizer.json"), ROOT) for made in (plain, folder))
    words = (*special_tokens.FIM, *special_tokens.MASK)
    assert [own.backend.token_to_id(word) for word in words] == [*range(before.vocab_size, before.vocab_size + 4)]
    assert own.vocab_size == before.vocab_size + 4 and json.loads((folder / "train.json").read_text())["tokenizer"] == f"{name}+fim+mask"


@pytest.mark.parametrize("cut", range(10))
def test_a_character_counts_in_the_part_of_its_last_byte(tmp_path, prepare, cut):
    text = "é猫🙂!"
    (tmp_path / "a.txt").write_text(text)
    if not 0 < cut < 10:
        with pytest.raises(Mistake, match="leaves train without a token of 11 → use more text"):
            prepare(["a.txt"], split=f"{cut + 0.01},{10 - cut}")
        return
    folder, _ = prepare(["a.txt"], split=f"{cut},{10 - cut}")
    sizes = [json.loads((folder / f"{part}.json").read_text())["bytes"] for part in ("train", "val")]
    assert sizes[0] == len(text.encode()[:cut].decode("utf-8", "ignore").encode()) and sum(sizes) == 10


def test_ids_are_those_of_whole_documents(tmp_path, lines, prepare, small_sizes, monkeypatch):
    """Wherever a document is cut for tokenization. Only a text without a place to cut may differ, and that is counted."""
    monkeypatch.setattr(corpus_inputs, "PIECE", 50)
    words = "many words  in one \n\n line " * 350
    (tmp_path / "a.txt").write_text(words + "".join(TEXTS))  # a zero byte at the beginning would mean that it is no text
    lines("b.jsonl", TEXTS)
    for name in ("builtin:bpe-300", tokenizer.CHARS):
        folder, _ = prepare(["a.txt", "b.jsonl"], name, "100", title=name[8:])
        own = tokenizer_file.load(str(folder / "tokenizer.json"), ROOT)
        documents = [(tmp_path / "a.txt").read_bytes().decode(), *TEXTS]
        assert read_store(folder / "train") == [[*own.encode(text), own.end_of_text] for text in documents]


def test_a_word_longer_than_memory_is_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_inputs, "LONGEST_WORD", 100)
    monkeypatch.setattr(corpus_inputs, "PIECE", 50)
    text = "a" * 1000 + " b " + "c" * 120
    (tmp_path / "a.txt").write_text(text)
    inputs = Inputs(["a.txt"], tmp_path, Reading())
    for own, cuts in ((tokenizer.gpt2(), 9), (tokenizer.fixed(tokenizer.BYTES), 0)):
        groups = list(inputs.groups(own, nothing))
        assert "".join(part for group in groups for part in group.texts) == text
        assert max(len(part) for group in groups for part in group.texts) <= 150
        assert sum(group.cuts for group in groups) == cuts


@pytest.mark.parametrize("name", [tokenizer.BYTES, pytest.param("builtin:bpe-300", marks=pytest.mark.slow)])
def test_two_processes_give_the_bytes_of_one(name, tmp_path, lines, prepare, small_sizes):
    lines("a.jsonl", TEXTS)
    one, two = (prepare(["a.jsonl"], name, "80,10,10", workers=workers, title=f"w{workers}")[0] for workers in (1, 2))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == 12
    for name in names:
        same = (one / name).read_bytes() == (two / name).read_bytes().replace(b"w2/", b"w1/")
        assert same, name


def test_bpe_is_trained_on_the_training_part(lines, prepare, small_sizes, tmp_path, monkeypatch):
    """The table is that of the documents of `train` alone, or of the beginning of a single document."""
    monkeypatch.setattr(corpus_inputs, "AT_ONCE", 7)
    monkeypatch.setattr(tokenizer_processes, "made_in_process", tokenizer.made_from)
    lines("a.jsonl", [f"{chr(97 + i % 26) * 5} the cat" for i in range(100)])
    folder, _ = prepare(["a.jsonl"], "builtin:bpe-300", "50,50")
    own = tokenizer_file.load(str(folder / "tokenizer.json"), ROOT)
    texts = [own.decode(ids[:-1]) for ids in read_store(folder / "train")]
    assert len(texts) == 50 and (folder / "tokenizer.json").read_text() == tokenizer.train_bpe(texts, 300)
    (tmp_path / "b.txt").write_text("ab " * 500 + "cd " * 500)
    folder, _ = prepare(["b.txt"], "builtin:bpe-300", "50,50", title="b")
    assert (folder / "tokenizer.json").read_text() == tokenizer.train_bpe(["ab " * 500], 300)
    monkeypatch.setattr(corpus_inputs, "MOST_TRAINED", 300)
    inputs = Inputs(["b.txt"], tmp_path, Reading())
    monkeypatch.setattr(corpus_inputs, "PIECE", 30)
    some = list(inputs.training_texts(Split(shares_of("50,50"), 1, 3001, 0), 1500, nothing))
    assert 280 <= sum(map(len, some)) <= 340 and set("".join(some)) == set("ab ")


def interrupted(prepare, monkeypatch, *arguments, **settings):
    """`prepare`, ended after two parts."""
    keep = corpus_work.Work.keep_part

    def end(work, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        keep(work, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_work.Work, "keep_part", end)
        prepare(*arguments, **settings)


def test_what_is_finished_is_continued_with(tmp_path, lines, prepare, small_sizes, monkeypatch):
    """Only the rest is tokenized; another split needs nothing new; another text or tokenizer begins anew, which is said."""
    lines("a.jsonl", TEXTS)
    whole, _ = prepare(["a.jsonl"], title="whole")
    interrupted(prepare, monkeypatch, ["a.jsonl"])
    encoded = []
    encode = tokenizer.UnitTokenizer.encode_arrays
    monkeypatch.setattr(tokenizer.UnitTokenizer, "encode_arrays", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    folder, warned = prepare(["a.jsonl"], split="90,10")
    assert warned == ["continued: 2 parts of at least 3,000 tokens are there already"]
    assert 0 < len(encoded) < len(TEXTS)
    assert sum(len(store) for store in stores_of(folder, ["train", "val"]).values()) == len(TEXTS)

    interrupted(prepare, monkeypatch, ["a.jsonl"], title="other")
    lines("a.jsonl", TEXTS[1:])
    folder, warned = prepare(["a.jsonl"], title="other")
    assert warned == ["the input changed since this corpus was begun: begun anew"]
    assert sum(len(store) for store in stores_of(folder).values()) == len(TEXTS) - 1
    interrupted(prepare, monkeypatch, ["a.jsonl"], title="third")
    _, warned = prepare(["a.jsonl"], tokenizer.CHARS, title="third")
    assert warned == ["--tokenizer changed since this corpus was begun: begun anew"]
    assert whole.is_dir()


def test_a_damaged_part_is_made_again(lines, prepare, small_sizes, monkeypatch, tmp_path):
    lines("a.jsonl", TEXTS)
    whole, _ = prepare(["a.jsonl"], title="whole")
    interrupted(prepare, monkeypatch, ["a.jsonl"])
    part = tmp_path / "corpora" / ".mine.work" / "part_000001.npz"
    part.write_bytes(part.read_bytes()[:-100])
    folder, warned = prepare(["a.jsonl"])
    assert warned == ["continued: 1 parts of at least 3,000 tokens are there already"]
    assert stores_of(folder) == stores_of(whole)


def test_a_text_that_changes_meanwhile_is_noticed(tmp_path, lines, prepare, monkeypatch):
    lines("a.jsonl", TEXTS)
    read_all = Inputs.read_all

    def change(self, *arguments):
        found = read_all(self, *arguments)
        lines("a.jsonl", TEXTS[:9])
        return found

    monkeypatch.setattr(Inputs, "read_all", change)
    with pytest.raises(Mistake, match="a.jsonl has changed while it was read → run the command again"):
        prepare(["a.jsonl"])


def test_a_name_has_one_maker_at_a_time(tmp_path, lines, prepare):
    """A second process is refused and told of the first; a finished corpus is replaced only on request, and whole."""
    lines("a.jsonl", TEXTS)
    target = tmp_path / "corpora" / "mine"
    program = f"""
import sys, time, pathlib
from research.data import corpus_work
with corpus_work.opened(pathlib.Path({str(target)!r}), False):
    print("in", flush=True)
    sys.stdin.readline()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "in\n"
    with pytest.raises(Mistake, match=f"is being prepared by process {holder.pid} on .* → wait for it, or name another corpus"):
        prepare(["a.jsonl"])
    holder.communicate("\n", timeout=60)
    prepare(["a.jsonl"])
    with pytest.raises(Mistake, match="mine is there already → name another corpus, or add --replace"):
        prepare(["a.jsonl"], split="50,50")
    folder, _ = prepare(["a.jsonl"], split="50,50", replace=True)
    assert not (folder / "test.idx").exists() and sorted(path.name for path in folder.parent.iterdir()) == ["mine"]


def test_shares():
    assert [float(share) for share in shares_of("98,1,1").values()] == [0.98, 0.01, 0.01]
    assert list(shares_of("9, 0,1")) == ["train", "test"] and list(shares_of("100")) == ["train"]
    for wrong in ("", "a,b", "0,1", "1,2,3,4", "-1,2", "1/0,2", "nan,1", "1e999,1"):
        with pytest.raises(Mistake, match="is not one to three shares"):
            shares_of(wrong)


def test_every_document_is_in_one_part():
    """Whatever the numbers: the parts are disjoint, cover everything and have their shares, rounded."""
    for documents in (100, 101, 997):
        split = Split(shares_of("80,15,5"), documents, 10**6, 3)
        where = split.of_documents(np.arange(documents))
        sizes = np.bincount(where, minlength=3).tolist()
        assert sizes == np.diff(split.limits, prepend=0).tolist() and sum(sizes) == documents
        assert all(abs(size - share * documents) <= 1 for size, share in zip(sizes, (0.8, 0.15, 0.05), strict=True))
    by_position = Split(shares_of("80,15,5"), 3, 101, 3)
    assert by_position.by_position and by_position.limits == [80, 95, 101]
    assert [end - begin for begin, end in pairwise(by_position.limits)] == [15, 6]
    assert random_split.NAMES == ("train", "val", "test")
