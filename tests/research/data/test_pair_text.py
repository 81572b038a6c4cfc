"""Pairs as text: lines of JSON and aligned files become the same documents, no text can hold a separator, and every bad line is named."""

import json
import lzma
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research import ROOT
from research.__main__ import main
from research.data import documents, prepare, tokenizer
from research.data.pair_inputs import rendered, separator_of
from research.data.pair_text import Pair
from research.data.rendered_text import ExampleEncoder
from research.data.token_store import TokenStore
from tests.research.helpers.example import sentence

BYTES = tokenizer.fixed("builtin:bytes+sep")
BUILTIN = "builtin:libreoffice_help_en_de"
SIZES = {"train": (25724, 2_353_023, 2_862_223), "val": (578, 50_187, 61_406), "test": (688, 64_145, 77_072)}
PAIRS = [("A cat.", "Eine Katze."), ("It says <sep> and <|endoftext|>.", "Es sagt <sep>."), ("猫 🙂", " é\u2028x")]
SEP = separator_of(BYTES)


def lines_of(pairs):
    return "".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs)


def ids_of(source, target):
    """The contract: source, separator, target, end-of-text."""
    return [*source.encode(), SEP, *target.encode(), BYTES.end_of_text]


def loaded(folder, train, validation="val.jsonl", name="builtin:bytes+sep", vocab_size=600):
    data = SimpleNamespace(train=train, validation=validation, tokenizer=name, cache="cache")
    return prepare.load(data, folder, vocab_size)


def documents_of(store):
    return [store.tokens[begin:end].tolist() for begin, end in store.documents()]


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["prepare", *arguments, "--corpora", str(tmp_path / "corpora")])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("split", SIZES)
def test_the_built_in_pairs(split):
    raw = lzma.decompress((documents.FOLDER / "libreoffice_help_en_de" / f"{split}.jsonl.xz").read_bytes())
    rows = [json.loads(line) for line in raw.splitlines()]
    sizes = [sum(len(row[side].encode()) for row in rows) for side in ("source", "target")]
    assert (len(rows), *sizes) == SIZES[split]
    found = list(documents.documents_and_pairs(f"{BUILTIN}/{split}", ROOT))
    assert [(one.source, one.target) for one in found] == [(row["source"], row["target"]) for row in rows]


def test_no_pair_is_in_two_splits():
    found = {split: set(documents.documents(f"{BUILTIN}/{split}", ROOT)) for split in SIZES}
    assert not (found["train"] & found["val"] or found["train"] & found["test"] or found["val"] & found["test"])


def test_a_file_of_pairs_is_trained_on_without_a_prepare(tmp_path):
    """The letters of special tokens in a text stay letters, and a file may hold texts beside pairs."""
    (tmp_path / "train.jsonl").write_text(lines_of(PAIRS) + '\n{"text": "alone"}\n' + lines_of(PAIRS[:1]), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(lines_of(PAIRS[1:]), encoding="utf-8")
    found = loaded(tmp_path, "train.jsonl")
    alone = [*b"alone", BYTES.end_of_text]
    assert documents_of(found.train) == [*(ids_of(*pair) for pair in PAIRS), alone, ids_of(*PAIRS[0])]
    assert documents_of(found.validation) == [ids_of(*pair) for pair in PAIRS[1:]]
    assert found.validation.num_bytes == sum(len(f"{source}<sep>{target}".encode()) for source, target in PAIRS[1:])
    assert list(documents.documents("val.jsonl", tmp_path)) == [f"{source}\n{target}" for source, target in PAIRS[1:]]


def test_a_joint_bpe_is_trained_on_both_sides(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines_of([("wonderful mornings", "schöne Morgenstunden")] * 50), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(lines_of([("a", "b")]), encoding="utf-8")
    own = loaded(tmp_path, "train.jsonl", name="builtin:bpe-400+sep").tokenizer
    assert [len(own.encode(text)) for text in ("wonderful", "schöne", "<sep>")] == [1, 1, 5]
    assert own.decode([separator_of(own)]) == "<sep>"


def test_lines_and_aligned_files_are_prepared_alike(said, tmp_path):
    """And as a run makes them of the lines by itself. Aligned files may be compressed."""
    pairs = PAIRS[:2] * 20
    (tmp_path / "pairs.jsonl").write_text(lines_of(pairs), encoding="utf-8")
    for name, side in (("train.en.xz", 0), ("train.de.xz", 1)):
        (tmp_path / name).write_bytes(lzma.compress("".join(pair[side] + "\r\n" for pair in pairs).encode()))
    ways = {"lines": ["pairs.jsonl"], "files": ["train.en.xz", "train.de.xz"]}
    for name, inputs in ways.items():
        code, out, err = said(*inputs, "--as", name, "--pairs", "--tokenizer", "builtin:bytes+sep", "--split", "100")
        assert (code, err) == (0, ""), err
        assert "pairs    source <sep> target" in out and "  data.examples=Pairs()\n" in out and "targets" in out
    stores = [TokenStore(tmp_path / "corpora" / name / "train") for name in ways]
    (tmp_path / "val.jsonl").write_text(lines_of(PAIRS), encoding="utf-8")
    stores.append(loaded(tmp_path, "pairs.jsonl").train)
    assert [documents_of(store) for store in stores] == [[ids_of(*pair) for pair in pairs]] * 3
    assert len({store.num_bytes for store in stores}) == 1
    mask = np.fromfile(tmp_path / "corpora" / "lines" / "train.mask.bin", np.uint8)
    assert mask[: len(ids_of(*PAIRS[0]))].tolist() == [0] * 7 + [1] * 12


def test_another_separator_and_a_bpe_of_prepare(said, tmp_path):
    """A tokenizer that `prepare` trains sees no letters of the separator. One that exists may have a separator of another name."""
    (tmp_path / "pairs.jsonl").write_text(lines_of([("words and words", "Wörter")] * 30), encoding="utf-8")
    code, out, err = said("pairs.jsonl", "--as", "one", "--pairs", "--tokenizer", "builtin:bpe-300+sep", "--split", "100")
    assert (code, err) == (0, ""), err
    file = tmp_path / "corpora" / "one" / "tokenizer.json"
    assert "sep" not in "".join(json.loads(file.read_text())["model"]["vocab"])
    (tmp_path / "their.json").write_text(file.read_text().replace('"<sep>"', '"<to>"'))
    code, out, err = said("pairs.jsonl", "--as", "two", "--pairs", "--tokenizer", "their.json", "--separator", "<to>", "--split", "100")
    assert (code, err) == (0, "") and 'data.examples=Pairs(separator="<to>")' in out, err
    assert documents_of(TokenStore(tmp_path / "corpora" / "two" / "train")) == documents_of(
        TokenStore(tmp_path / "corpora" / "one" / "train")
    )


PIECES = st.sampled_from([*"ab \n<sep>é", "<sep>", "<|endoftext|>", "\n\n"])
TEXT = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(str.strip)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=TEXT, target=TEXT)
def test_the_sides_are_tokenized_by_themselves_and_come_back(source, target):
    for own in (BYTES, BPE):
        [(ids, mask)] = ExampleEncoder(own).encode_arrays([rendered(Pair("", source, target), "<sep>")])
        sep = separator_of(own)
        assert ids.tolist() == [*own.encode(source), sep, *own.encode(target), own.end_of_text]
        assert mask.tolist() == [0] * (len(own.encode(source)) + 1) + [1] * (len(own.encode(target)) + 1)
        place = ids.tolist().index(sep)
        assert (own.decode(ids[:place]), own.decode(ids[place + 1 : -1])) == (source, target)


BPE = tokenizer.from_json("builtin:bpe-300+sep", tokenizer.train_bpe(["an example <sep> of a text\n\nand sep"] * 9, 300))
GOOD = lines_of(PAIRS[:1])
BAD_LINES = {
    '{"source": "x", "tgt": "y"}': "a.jsonl, line 2 has no \"target\": its keys are 'source', 'tgt' → write one object a line",
    '{"en": "x", "de": "y"}': "a.jsonl, line 2 has no",
    '{"source": "x", "target": " "}': 'a.jsonl, line 2: "target" is empty → leave the line out',
    '{"source": "", "target": "y"}': 'a.jsonl, line 2: "source" is empty',
    '{"source": "x", "target": 5}': 'a.jsonl, line 2: "target" is no text',
    '{"source": "x", "target": "\\ud800"}': "a.jsonl, line 2 has half a surrogate pair",
    '{"source": ': "a.jsonl, line 2 is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_both_ways(said, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(GOOD + line + "\n")
    (tmp_path / "val.jsonl").write_text(GOOD)
    assert BAD_LINES[line] in sentence(lambda: loaded(tmp_path, "a.jsonl"))
    code, _, err = said("a.jsonl", "--as", "mine", "--pairs", "--tokenizer", "builtin:bytes+sep")
    assert code == 2 and BAD_LINES[line] in err and " → " in err and err.count("\n") == 1
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("files", "arguments", "words"),
    [
        (("a\n" * 29000, "b\n" * 28999), (), "a.en has 29,000 lines and b.de 28,999 → let line i of one file be"),
        (("a\nb", "b\n\n"), (), "b.de, line 2 is empty → leave it out of both files"),
        (("a\n", "b\n"), ("--tokenizer", "builtin:bytes"), "which builtin:bytes does not have → use builtin:bpe-8192+sep"),
        (("a\n", "b\n"), ("--separator", "<to>"), "--pairs puts <to> between source and target"),
        (("a\n", "b\n"), ("--supervised",), "--supervised and --pairs are two kinds"),
        (("a\n", "b\n"), ("--key", "x"), "--key x is not for pairs"),
        (("a\n", "b\n"), ("pairs.jsonl",), "a.en is no .jsonl file"),
    ],
)
def test_a_bad_command_is_one_sentence_and_leaves_nothing(said, tmp_path, files, arguments, words):
    for name, text in zip(("a.en", "b.de"), files, strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "pairs.jsonl").write_text(GOOD)
    named = () if "--tokenizer" in arguments else ("--tokenizer", "builtin:bytes+sep")
    code, _, err = said("a.en", "b.de", *arguments, *named, "--as", "mine", "--pairs")
    assert code == 2 and words in err and " → " in err and err.count("\n") == 1, err
    assert not (tmp_path / "corpora").exists()


def test_a_folder_is_no_side_and_a_tokenizer_needs_the_separator(said, tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a\n")
    code, _, err = said("en", "de", "--as", "mine", "--pairs", "--tokenizer", "builtin:bytes+sep")
    assert code == 2 and "en and de are not two files" in err
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "val.jsonl").write_text(GOOD)
    text = sentence(lambda: loaded(tmp_path, "a.jsonl", name="builtin:bytes"))
    assert "pairs need the special token '<sep>', which the tokenizer builtin:bytes does not have → use one" in text
    code, _, err = said("a.jsonl", "--as", "mine")
    assert 'of pairs "source" and "target": prepare --pairs' in err
