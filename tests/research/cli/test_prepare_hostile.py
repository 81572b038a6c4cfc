"""`python -m research prepare` keeps what is not its own, and refuses what it cannot use, in one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from research import ROOT
from research.__main__ import main
from research.data import corpus_work
from tests.research.cli.test_prepare import plan, refused
from tests.research.helpers.killed_prepare import digest, ended

BYTES = ("--as", "mine", "--tokenizer", "builtin:bytes")


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """said(arguments): (exit code, standard output, standard error) of the verb in tmp_path, which has a text ok.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.txt").write_text("It was the best of times. " * 50)

    def run(*arguments):
        place = [] if "--corpora" in arguments else ["--corpora", str(tmp_path / "corpora")]
        code = main(["prepare", *arguments, *place])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "'' is no path"),
        (["~no-such-user/a.txt"], "nobody here has the home ~no-such-user"),
        (["ok.txt", "--tokenizer", "~no-such-user/tokenizer.json"], "nobody here has the home ~no-such-user"),
        (["ok.txt", "--corpora", "~no-such-user/corpora"], "nobody here has the home ~no-such-user"),
        (["ok.txt", "--corpora", ""], "'' is no path"),
        (["ok.txt", "--tokenizer", "builtin:bpe-1000001"], "is larger than 1000000"),
        (["ok.txt", "--tokenizer", "builtin:bpe-" + "9" * 5000], "is larger than 1000000"),
        (["ok.txt", "--workers", "99999"], "--workers 99999 is more than 4 per core"),
        (["ok.txt", "--split", "0,0,1"], "--split 0,0,1 is not one to three shares of which train has more than 0"),
        (["long.tiktoken", "--tokenizer", "long.tiktoken"], "line 1 has a token of 3000 bytes, the most is 1024"),
        (["utf16.txt"], "utf16.txt is not text, its beginning is binary"),
        (["zeros.txt"], "zeros.txt is not text, its beginning is binary"),
        (["twice.parquet"], "twice.parquet has 2 columns 'text'"),
        (["damaged.parquet"], "damaged.parquet is not a whole .parquet file"),
    ],
)
def test_input_that_cannot_be_used_is_one_sentence(said, tmp_path, arguments, words):
    (tmp_path / "long.tiktoken").write_text("YWFh" * 1000 + " 0\n")
    (tmp_path / "utf16.txt").write_bytes("without a byte-order mark".encode("utf-16-le"))
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    column = pyarrow.array(["one document"] * 99)
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "twice.parquet")
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "damaged.parquet", use_dictionary=False)
    raw = bytearray((tmp_path / "damaged.parquet").read_bytes())
    raw[4:24] = bytes(20)
    (tmp_path / "damaged.parquet").write_bytes(raw)
    refused(*said(*arguments, "--as", "mine", *["--tokenizer", "builtin:bytes"] * ("--tokenizer" not in arguments)), words)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to nothing"])
def test_only_a_corpus_is_replaced(said, tmp_path, kind):
    """What --replace would destroy, were it to replace anything of this name."""
    target, theirs = tmp_path / "corpora" / "mine", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("years of work")
    target.parent.mkdir()
    if kind == "folder":
        theirs.rename(target)
    elif kind == "file":
        (theirs / "notes.txt").rename(target)
    else:
        target.symlink_to(theirs if kind == "link" else tmp_path / "nothing")
    before = os.lstat(target)
    refused(*said("ok.txt", *BYTES), "mine is there already → name another corpus")
    refused(*said("ok.txt", *BYTES, "--replace"), "mine is no corpus that prepare has made")
    assert os.path.samestat(before, os.lstat(target)) and os.listdir(target.parent) == ["mine"]
    notes = {"folder": target / "notes.txt", "file": target}.get(kind, theirs / "notes.txt")
    assert notes.read_text() == "years of work"


def test_a_text_within_the_corpus_is_not_replaced_by_it(said, tmp_path):
    assert said("ok.txt", *BYTES)[0] == 0
    notes = tmp_path / "corpora" / "mine" / "notes.txt"
    notes.write_text("It was the worst of times. " * 50)
    refused(*said(str(notes), *BYTES, "--replace"), "the folder that is made → name another corpus")
    assert notes.is_file()


def test_a_corpus_that_another_process_publishes_meanwhile_is_kept(said, tmp_path, monkeypatch):
    """Both before the lock is taken and before the result gets its name."""
    target, publish = tmp_path / "corpora" / "mine", corpus_work.Work.publish

    def second(work, replace):
        target.mkdir()
        (target / "theirs").write_text("")
        publish(work, replace)

    monkeypatch.setattr(corpus_work.Work, "publish", second)
    refused(*said("ok.txt", *BYTES), "mine is there already → name another corpus")
    assert os.listdir(target) == ["theirs"] and os.listdir(target.parent) == ["mine"]


def test_a_tokenizer_is_called_as_its_user_calls_it(said, tmp_path):
    assert said("ok.txt", *BYTES)[0] == 0
    (tmp_path / "corpora" / "mine" / "tokenizer.json").rename(tmp_path / "their.json")
    code, out, _ = said("ok.txt", "--as", "other", "--tokenizer", "their.json")
    assert code == 0 and "tokens   their.json · 257 in the vocabulary" in out


def test_sources_are_json_whatever_the_names_of_the_files(said, tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"tree")
    os.mkdir(folder)
    names = [b"\xff.txt", "a\nb é.txt".encode()]
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"It was the best of times. " * 9)
    assert said("tree", *BYTES)[0] == 0
    lines = (tmp_path / "corpora" / "mine" / "sources.jsonl").read_bytes().decode().splitlines()
    assert {os.fsencode(json.loads(line)["path"]) for line in lines} == {b"tree/" + name for name in names}


@pytest.mark.parametrize("name", ["plan.json", "inventory.json", "tokenized.json", "part_000000.npz"])
def test_a_damaged_file_of_unfinished_work_is_made_again(said, tmp_path, monkeypatch, name):
    assert said("ok.txt", *BYTES)[0] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "corpora" / "mine").iterdir()}
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(corpus_work.Work, "publish", lambda *_: (_ for _ in ()).throw(SystemError))
        said("ok.txt", "--as", "again", "--tokenizer", "builtin:bytes")
    damaged = tmp_path / "corpora" / ".again.work" / name
    assert damaged.stat().st_size
    damaged.write_bytes(b'{"parts": null, "x": 1}')
    code, _, err = said("ok.txt", "--as", "again", "--tokenizer", "builtin:bytes")
    assert code == 0, err
    again = {path.name: path.read_bytes() for path in (tmp_path / "corpora" / "again").iterdir()}
    assert again["train.bin"] == whole["train.bin"] and again.keys() == whole.keys()


@pytest.mark.slow
def test_kills_of_a_replacement_change_nothing(tmp_path):
    """Around the renames, the same command gives the new corpus alone; another one finds the old or the new corpus whole."""
    settings = plan(tmp_path, 0, "--tokenizer", "builtin:bytes")
    program = (
        "import json, sys; from tests.research.cli.test_prepare_hostile import killed_replacements\n"
        "print(json.dumps(killed_replacements(json.loads(sys.argv[1]))))"
    )
    finished = subprocess.run([sys.executable, "-c", program, json.dumps(settings)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert len(results["kills"]) == 24
    for kill in results["kills"]:
        assert kill["code"] == -signal.SIGKILL and kill["again"] == 0 and kill["same"], kill
        assert kill["other"] == 2 and kill["kept"] in (["mine"], [".mine.work", "mine"]) and kill["whole"], kill


def killed_replacements(settings):
    """Of the last 24 moments of `prepare --replace`: what a kill leaves, and what the same command and one without --replace make of it."""
    folder, arguments, sizes = Path(settings["folder"]), settings["arguments"], settings["sizes"]
    base, whole, place = (folder / name for name in ("base", "whole", "place"))
    ended(arguments + ["--split", "50,50"], base, sizes)
    shutil.copytree(base, whole)
    ended(arguments + ["--replace"], whole, sizes)
    before, after, last = digest(base), digest(whole), int(whole.with_suffix(".moments").read_text())
    kills = []
    for moment in range(last - 23, last + 1):
        kill = {"moment": moment}
        for replace in (["--replace"], []):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(base, place)
            kill["code"] = ended(arguments + ["--replace"], place, sizes, moment, signal.SIGKILL)["code"]
            code = ended(arguments + replace, place, sizes)["code"]
            if replace:
                kill |= {"again": code, "same": digest(place) == after}
            else:
                left = {name: sha256 for name, sha256 in digest(place).items() if name.startswith("mine")}
                kill |= {"other": code, "kept": sorted(os.listdir(place)), "whole": left in (before, after)}
        kills.append(kill)
    return {"kills": kills}
