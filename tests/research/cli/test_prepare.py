"""`python -m research prepare`: what it prints, every bad input in one sentence, and kills at any moment."""

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research import ROOT
from research.__main__ import main
from research.data import tokenizer, tokenizer_ranks
from tests.research.helpers import killed_prepare

WORDS = ["state", "union", "the", "of", "é", "猫", "people", "\n"]


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """said(arguments): (exit code, standard output, standard error) of the verb in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["prepare", *arguments, "--corpora", str(tmp_path / "corpora")])
        return code, *capsys.readouterr()

    return run


def test_a_book_becomes_a_corpus_and_lines_to_paste(said, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 100)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", *["more"] * 200]))
    (tmp_path / "more" / "picture.png").write_bytes(b"\0PNG")
    code, out, err = said("book.txt", "more", "--as", "mine", "--tokenizer", "builtin:bytes")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    place = tmp_path / "corpora" / "mine"
    assert lines[:3] == [f"prepare {place}", "input    2 files, 6.0 kB", "left out 1 file is left out (1 not text)"]
    assert "counted  1 empty document left out" in lines
    assert "split    train 98 %, val 1 %, test 1 % · by document, at random with seed 0" in lines
    table = [
        line.split() for line in lines[lines.index("split    train 98 %, val 1 %, test 1 % · by document, at random with seed 0") + 2 :]
    ]
    assert table[0] == ["documents", "tokens", "bytes", "tokens/byte"] and [row[:2] for row in table[1:4]] == [
        *(["train", "197"], ["val", "2"], ["test", "2"]),
    ]
    assert sum(int(row[2].replace(",", "")) for row in table[1:4]) == 2600 + 4 * 200 + 201
    assert lines[-4:] == [
        f'  data.train="store:{place}/train"',
        f'  data.validation="store:{place}/val"',
        f'  data.tokenizer="{place}/tokenizer.json"',
        "  model.vocab_size=257",
    ]


def test_help_teaches_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, out.splitlines())) <= 80
    for word in ("--as", ".parquet", "builtin:chars", ".tiktoken", "--split", "examples:", "requirements-data.txt"):
        assert word in out, word


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "empty.txt": (b"", "empty.txt is empty"),
    "none.jsonl": (b"\n\n", "none.jsonl holds no text"),
    "blank.jsonl": (b'{"text": ""}\n', "holds no text, only empty documents"),
    "latin.txt": (b"one\ncaf\xe9 ", "latin.txt, line 2 is not UTF-8 (byte 3: "),
    "wide.txt": ("ab".encode("utf-16"), "wide.txt is UTF-16"),
    "key.jsonl": (b'{"body": "x", "id": 3}\n', "line 1 has no \"text\": its keys are 'body', 'id'"),
    "half.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "line 2 has half a surrogate pair"),
    "json.jsonl": (GOOD + b'{"text": ', "line 2 is not JSON"),
    "binary.dat": (b"ab\0\1", "binary.dat is not text"),
    "cut.txt.gz": (gzip.compress(b"x" * 999)[:-9], "is not a whole .txt.gz file"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 99)[:-9], "is not a whole .jsonl.xz file"),
    "no.parquet": (b"PAR1", "is not a whole .parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(said, tmp_path, name):
    raw, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(raw)
    refused(*said(name, "--as", "mine", "--tokenizer", "builtin:bytes"), words)
    assert not (tmp_path / "corpora").exists()


def refused(code, _, err, words):
    assert code == 2 and err.startswith("error  ") and err.count("\n") == 1 and words in err and " → " in err, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["ok.txt", "pictures"], "pictures has no file of text: 1 file is left out (1 not text)"),
        (["ok.txt", "ok.txt"], "ok.txt is ok.txt once more"),
        (["ok.txt", "."], "ok.txt is ok.txt once more"),
        (["ok.txt", "--split", "98,x"], "--split 98,x is not one to three shares"),
        (["ok.txt"], "--split 98,1,1 leaves val without a token of 3"),
        (["ok.txt", "--tokenizer", "builtin:byte"], "--tokenizer = 'builtin:byte' is not known (builtin:bytes is meant?)"),
        (["ok.txt", "--tokenizer", "builtin:bpe-9"], "is smaller than 257"),
        (["ok.txt", "--tokenizer", "none.json"], "none.json does not exist → name a tokenizer.json"),
        (["ok.txt", "--tokenizer", "pictures"], "pictures/tokenizer.json does not exist"),
        (["ok.txt", "--tokenizer", "ok.txt"], "is not a kind of file that is known"),
        (["ok.txt", "--tokenizer", "bad.json"], "bad.json is not JSON"),
        (["ok.txt", "--tokenizer", "bad.tiktoken"], "line 1 is no token in base64"),
        (["ok.txt", "--workers", "0"], "'0' is not a whole number from 1"),
        (["ok.txt", "--keys", "x"], "does not know --keys → did you mean --key?"),
        (["ok.txt", "--as", "a/b"], "--as a/b is no name of a corpus"),
    ],
)
def test_a_bad_command_is_one_sentence_and_leaves_nothing(said, tmp_path, arguments, words):
    (tmp_path / "ok.txt").write_text("ab")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\0")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.tiktoken").write_text("%")
    names = ["--as", "mine"] * ("--as" not in arguments)
    refused(*said(*arguments, *names, *["--tokenizer", "builtin:bytes"] * ("--tokenizer" not in arguments)), words)
    assert not (tmp_path / "corpora").exists()


def test_invalid_bytes_are_replaced_and_counted_on_request(said, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    code, out, _ = said("latin.txt", "--as", "mine", "--tokenizer", "builtin:chars", "--invalid", "replace", "--split", "90,10")
    assert code == 0 and "counted  40 replacements by U+FFFD, of bytes that are not UTF-8" in out
    assert "by position in tokens, because 1 document is too few" in out


def test_another_tokenizer_by_its_file_or_folder(said, tmp_path):
    """Its files lie beside the corpus, the end of a text is the one it names, and ids are its own."""
    (tmp_path / "a.txt").write_text("it was the best of times " * 9)
    folder = tmp_path / "their"
    folder.mkdir()
    made = tokenizer.train_bpe(["it was the best of times " * 9], 300).replace("<|endoftext|>", "</s>")
    (folder / "tokenizer.json").write_text(made)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "auto_map": {"AutoTokenizer": "evil.py"}}')
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"it": 256, b" t": 257}
    (tmp_path / "my.tiktoken").write_text("".join(f"{tokenizer_ranks.base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    for number, (name, size) in enumerate({"their": None, "their/tokenizer.json": None, "my.tiktoken": 259}.items()):
        code, out, err = said("a.txt", "--as", f"c{number}", "--tokenizer", name, "--split", "100")
        assert code == 0, err
        place = tmp_path / "corpora" / f"c{number}"
        config = json.loads((place / "tokenizer_config.json").read_text())
        assert config["eos_token"] == ("<|endoftext|>" if size else "</s>") and "auto_map" not in config
        if size:
            assert f"model.vocab_size={size}" in out
    assert (tmp_path / "corpora" / "c0" / "train.bin").read_bytes() == (tmp_path / "corpora" / "c1" / "train.bin").read_bytes()


def plan(folder: Path, kills: int, *arguments: str) -> dict:
    draw = random.Random(1)
    documents = (" ".join(draw.choices(WORDS, k=draw.randrange(1, 60))) for _ in range(400))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "b.txt").write_text(" ".join(draw.choices(WORDS, k=3000)))
    command = [str(folder / "a.jsonl"), str(folder / "b.txt"), "--as", "mine", *arguments]
    return {"folder": str(folder), "arguments": command, "sizes": [5000, 2000], "kills": kills, "seed": 3}


def check_kills(plan: dict) -> dict[str, str]:
    """Each kill ends the process, and the same command then gives the files of an undisturbed run, and no others. Returns these."""
    command = [sys.executable, "-m", "tests.research.helpers.killed_prepare", json.dumps(plan)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert results["undisturbed"]["code"] == 0 and any(name.endswith("train.bin") for name in results["expected"])
    for kill in results["kills"]:
        published = kill["again"]["code"] == 2 and "is there already" in kill["again"]["said"]
        assert kill["code"] == -signal.SIGKILL and kill["same"] and (kill["again"]["code"] == 0 or published), kill
    assert len(results["kills"]) == plan["kills"] and any(kill["parts"] > 0 for kill in results["kills"])
    return results["expected"]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "arguments"), [(20, "--tokenizer builtin:bpe-300"), (9, "--tokenizer builtin:chars --workers 2")])
def test_kills_at_many_moments_change_nothing(tmp_path, kills, arguments):
    check_kills(plan(tmp_path, kills, *arguments.split()))


def in_forks(folder: Path, runs: list[tuple[str, dict]]) -> list[dict]:
    """What killed_prepare.ended returns for each folder of corpora and its settings, one after the other, in one process."""
    command = plan(folder, 0, "--tokenizer", "builtin:bytes")
    program = (
        "import json, pathlib, sys; from tests.research.helpers.killed_prepare import ended\n"
        "arguments, sizes, runs = json.loads(sys.argv[1])\n"
        "print(json.dumps([ended(arguments, pathlib.Path(place), sizes, **run) for place, run in runs]))"
    )
    settings = json.dumps([command["arguments"], command["sizes"], [(str(folder / place), run) for place, run in runs]])
    finished = subprocess.run([sys.executable, "-c", program, settings], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_ctrl_c_a_kill_and_a_full_disk_change_nothing_and_say_how_to_continue(tmp_path):
    """One after the other, on the same corpus, which is then that of an undisturbed command."""
    disturbed = [{"moment": 60, "number": int(signal.SIGINT)}, {"moment": 60, "number": int(signal.SIGKILL)}, {"most_bytes": 40_000}]
    undisturbed, interrupted, killed, full, again, other = in_forks(
        tmp_path, [("whole", {}), *(("out", settings) for settings in (*disturbed, {}, {}))]
    )
    assert undisturbed["code"] == 0 and "continued" not in undisturbed["said"]
    assert interrupted["code"] == 130 and "Traceback" not in interrupted["said"]
    assert interrupted["said"].splitlines()[-1] == (
        f"warn   ended by Ctrl-C: {tmp_path}/out/.mine.work has what is finished, and the same command continues"
    )
    assert killed["code"] == -signal.SIGKILL
    last = full["said"].splitlines()[-1]
    assert full["code"] == 2 and last.startswith("error  ") and "cannot be written (File too large)" in last, full
    assert last.endswith("→ make room; the same command continues")
    assert again["code"] == 0 and "continued: " in again["said"]
    assert other["code"] == 2 and "is there already" in other["said"]
    assert killed_prepare.digest(tmp_path / "out") == killed_prepare.digest(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == ["mine"]
