"""What an import puts into a run's folder, step by step: which reader is taken, how paths are named, which tokenizer, in what order."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from models.conversion import read_config
from models.estimates.parameters import parameters
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from research.cli import import_
from research.config import serialization
from research.data import tokenizer_file
from research.exchange import parity, tokenizer_parity
from research.exchange.gguf import GGUFFile
from research.exchange.hf_reader import HFFolder
from research.exchange.importer import CERTIFICATE, CHECKPOINT, OTHER_TOKENIZER, Import, opened
from research.exchange.tokenizer_parity import IdsComparison
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from tests.research.helpers import gguf_files
from tests.research.helpers.hf_models import CASES, their_folder, their_tokenizer, tree
from tests.research.helpers.launches import ROOT

CASE = "pythia"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return their_folder(tmp_path_factory.mktemp("theirs") / "model", CASE, max_shard_size="60KB")


def begun(source, place: Path, runs: Path | None = None) -> Import:
    """An import whose run will lie in `runs` (default: in the tree)."""
    where = place / "tree" if (place / "tree").is_dir() else tree(place)
    root = runs or where / "runs"
    (root / ".staging").mkdir(parents=True)
    return Import(source, RunFolder(root / ".staging"), RunFolder(root / "mine" / "abcdef"), where)


def test_a_folder_and_a_file_each_have_their_reader(folder, tmp_path):
    with opened(folder) as source:
        assert isinstance(source, HFFolder) and source.family.name == "gpt_neox"
    with opened(gguf_files.write(tmp_path / "m.gguf")) as file:
        assert isinstance(file, GGUFFile)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "there is no .*nowhere → name a Hugging Face folder or a .gguf file on this machine: nothing is downloaded"),
        ("org/model", "there is no .*org/model → .*: nothing is downloaded"),
        ("model.bin", "model.bin is neither a folder nor a .gguf file → name the folder that holds the model's config.json"),
        ("empty", "empty/config.json cannot be read"),
        ("broken", "there is no .*broken"),
    ],
)
def test_what_is_neither_is_told_what_is(name, words, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Mistake, match=words):
        import_.check_exists(tmp_path / name)
        with opened(tmp_path / name):
            raise AssertionError("nothing is opened")


def test_a_folder_with_pickles_alone_says_how_to_go_on(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    words = "pytorch_model.bin is a pickle, which is a program: it is not opened → .*save_pretrained"
    with pytest.raises(Mistake, match=words), opened(tmp_path):
        raise AssertionError("nothing is opened")


def test_the_line_says_what_it_is(folder, tmp_path):
    with opened(folder) as source:
        line = begun(source, tmp_path).line()
    size = sum(parameter.numel() for parameter in _their_parameters())
    assert line == f"import model · gpt_neox · 2 layers, hidden 64, 4 heads · {size / 1e3:.1f} k parameters"
    assert parameters(read_config.settings(CASES[CASE])) == size


def _their_parameters():
    from tests.research.helpers.hf_models import their_model

    return their_model(CASE).parameters()


def test_paths_are_named_as_they_will_be(folder, tmp_path):
    """Staged under a hidden name, named by the last one: from the tree where they lie in it, whole elsewhere."""
    with opened(folder) as source:
        inside = begun(source, tmp_path)
        assert inside.named(inside.staging.checkpoints / CHECKPOINT) == "runs/mine/abcdef/checkpoints/step_000000"
        outside = begun(source, tmp_path, tmp_path / "elsewhere")
        assert outside.named(outside.staging.path / "tokenizer") == str(tmp_path / "elsewhere" / "mine" / "abcdef" / "tokenizer")


def test_the_folder_is_filled_and_the_certificate_says_from_what(folder, tmp_path):
    with opened(folder) as source:
        found = begun(source, tmp_path)
        certificate = found.fill(None, Console())
        staged = found.staging
        told = json.loads((staged.path / CERTIFICATE).read_text())
        assert certificate.passed and told.pop("ids") == {"tokens": found.ids.tokens, "equal": True} and told == certificate.table()
        with Reader(latest(staged.checkpoints)) as reader:
            assert reader.facts["imported"].keys() == {path.name for path in source.files()}
            assert len(reader.facts["imported"]) > 3  # the index, the settings and every shard
    told = json.loads(staged.run.read_text())
    assert (told["name"], told["id"], told["source"], told["family"]) == ("mine", "abcdef", "model", "gpt_neox")
    settings = serialization.load(staged.config)
    assert (settings.init_from, settings.track.runs) == ("runs/mine/abcdef/checkpoints/step_000000", "runs")
    assert sorted(os.listdir(staged.path)) == [CERTIFICATE, "checkpoints", "config.json", "logs", "run.json", "tokenizer"]


def test_what_cannot_work_is_known_before_a_weight_is_read(folder, tmp_path, monkeypatch):
    """A tokenizer of more tokens than the model has rows."""
    monkeypatch.setattr(HFFolder, "read", lambda *arguments: pytest.fail("a weight was read"))
    missing = str(tmp_path / "tokenizer.json")
    for i, (words, said) in enumerate([(missing, "tokenizer.json is not there"), ("builtin:gpt2", "has 50257 tokens, the model")]):
        with opened(folder) as source, pytest.raises(Mistake, match=said):
            begun(source, tmp_path, tmp_path / str(i)).fill(words, Console())


def test_gpt_2_s_own_tokenizer_is_named_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "wide", type(CASES["gpt2"])(n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=50257))
    with opened(their_folder(tmp_path / "model", "wide")) as source:
        found = begun(source, tmp_path)
        assert found.fill("builtin:gpt2", Console()).passed
    assert serialization.load(found.staging.config).data.tokenizer == "builtin:gpt2"
    assert OTHER_TOKENIZER in found.left_out and not any("tokenizer_config.json" in sentence for sentence in found.left_out)
    assert not (found.staging.path / "tokenizer").exists()


def test_a_file_of_another_place_replaces_the_model_s_own(folder, tmp_path):
    their_tokenizer().save_pretrained(tmp_path / "mine")
    with opened(folder) as source:
        found = begun(source, tmp_path)
        found.fill(str(tmp_path / "mine" / tokenizer_file.FILE), Console())
    copied = found.staging.path / "tokenizer" / tokenizer_file.FILE
    assert copied.read_bytes() == (tmp_path / "mine" / tokenizer_file.FILE).read_bytes()


def test_a_certificate_that_fails_is_returned_not_raised(folder, tmp_path, monkeypatch):
    """Who asked says so and leaves nothing; the numbers are needed for that."""
    monkeypatch.setattr(parity.Certificate, "passed", property(lambda self: False))
    with opened(folder) as source:
        certificate = begun(source, tmp_path).fill(None, Console())
    assert not certificate.passed and certificate.table()["passed"] is False


def changed(folder: Path, place: Path, case: str, **tables: dict) -> Path:
    """A folder of a case with keys of its JSON files set."""
    target = place / "changed"
    shutil.copytree(folder, target) if case == CASE else their_folder(target, case)
    for name, changes in tables.items():
        path = target / f"{name}.json"
        table = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps(table), encoding="utf-8-sig")  # with a byte-order mark, which transformers does not read
    return target


def test_what_transformers_reads_is_imported_whatever_is_not_said_there(folder, tmp_path, capsys):
    """Tables with byte-order marks, keys that are null for a missing key, and a tied table under its head's name alone."""
    model = changed(folder, tmp_path, "qwen3, one kv head, wide", config={"hidden_act": None, "rms_norm_eps": None}, generation_config={})
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with opened(model) as source:
        found = begun(source, tmp_path)
        assert found.fill(None, Console()).passed and found.left_out == []
    assert "ids      equal to those of transformers' tokenizer" in capsys.readouterr().out


def test_a_token_that_the_model_has_no_row_for_is_left_out_and_named(folder, tmp_path):
    """As it is where somebody added a [PAD] and no row. One of the vocabulary itself is a Mistake that names it."""
    model = changed(folder, tmp_path, CASE, tokenizer_config={"pad_token": "[PAD]"}, generation_config={"pad_token_id": 331})
    table = json.loads((model / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 331, "content": "[PAD]"})
    (model / "tokenizer.json").write_text(json.dumps(table))
    with opened(model) as source:
        found = begun(source, tmp_path)
        (found.staging.path / "tokenizer").mkdir()
        _, tokenizer = found._make_tokenizer(None)
    assert tokenizer.vocab_size == 300 and found.ids.difference is None
    assert found.left_out[0] == "tokenizer.json: '[PAD]' (331): the model's table has no row for it, only 331"
    assert "pad_token" not in (found.staging.path / "tokenizer" / "tokenizer_config.json").read_text()

    table["added_tokens"].pop()
    table["model"]["vocab"]["[LAST]"] = 331
    (model / "tokenizer.json").write_text(json.dumps(table))
    with opened(model) as source, pytest.raises(Mistake, match=r"has 332 tokens, the model 331 \(the last token is '\[LAST\]'\)"):
        found = begun(source, tmp_path, tmp_path / "other")
        (found.staging.path / "tokenizer").mkdir()
        found._make_tokenizer(None)


PREFIXED = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}


def test_ids_are_those_of_transformers_also_where_it_changes_the_tokenizer(folder, tmp_path):
    """add_prefix_space stands in tokenizer_config.json alone. What tokenizer.json puts behind a text is told and left out."""
    model = changed(folder, tmp_path, CASE, tokenizer_config=PREFIXED)
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)])
    backend.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes()[3:])  # for transformers itself, below
    with opened(model) as source:
        found = begun(source, tmp_path)
        (found.staging.path / "tokenizer").mkdir()
        _, tokenizer = found._make_tokenizer(None)
    theirs = transformers.AutoTokenizer.from_pretrained(model)("Mr. Speaker,").input_ids
    assert theirs == [*tokenizer.prompt("Mr. Speaker,"), 0] and tokenizer.begin == (0,)
    assert theirs != their_tokenizer()("Mr. Speaker,").input_ids
    told, tail = found.left_out
    assert told.startswith(
        "tokenizer.json as it stands: transformers' GPT2Tokenizer gives other ids, which are taken: token 1 of the text is"
    )
    assert told.endswith(f"→ --tokenizer {model}/tokenizer.json takes the file as it is") and tail.startswith(
        "'<|end|>' at the end of a text"
    )


def test_ids_that_cannot_be_made_equal_are_refused_with_the_way_out(folder, tmp_path, monkeypatch):
    different = IdsComparison(3, "token 2 of the text is [1] ('a') there and [2] ('b') here", ())
    monkeypatch.setattr(tokenizer_parity, "compare", lambda *arguments: different)
    words = r"transformers gives other ids: token 2 .* → --tokenizer .*/tokenizer.json takes the file as it is"
    with opened(folder) as source, pytest.raises(Mistake, match=words):
        begun(source, tmp_path).fill(None, Console())


def test_a_tokenizer_that_panics_is_one_sentence(folder, tmp_path, capfd):
    """Its pattern reaches the limit of its engine on a word of the certificate's text. What Rust writes of it is not shown."""
    model = shutil.copytree(folder, tmp_path / "model")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    splits = [pre_tokenizers.Split(Regex("([a-zA-Z ,.]+)+[0-9]{9}"), "isolated"), backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.save(str(model / "tokenizer.json"))
    with opened(model) as source, pytest.raises(Mistake, match=r"cannot encode .* characters .*\(Onig.*\) → .*--tokenizer PATH") as caught:
        begun(source, tmp_path).fill(None, Console())
    assert "\n" not in str(caught.value) and "panicked" not in capfd.readouterr().err
    with opened(folder) as source, pytest.raises(Mistake, match=r"cannot encode a text of .* characters \(Onig.*→"):
        begun(source, tmp_path / "other").fill(str(model / "tokenizer.json"), Console())
    assert "panicked" not in capfd.readouterr().err


def test_no_message_names_a_temporary_path(folder, tmp_path):
    """Neither where transformers cannot read the tokenizer or the model, nor where the staged tokenizer is of no use."""
    model = changed(folder, tmp_path, CASE, tokenizer_config={"added_tokens_decoder": {"0": 3}, "eos_token": "<nobody>"})
    with opened(model) as source:
        found = begun(source, tmp_path)
        (found.staging.path / "tokenizer").mkdir()
        found._make_tokenizer(None)
        assert any(sentence.startswith("token ids were not compared: transformers cannot read") for sentence in found.left_out)
        (model / "model-00001-of-00008.safetensors").unlink(missing_ok=True)
        for path in model.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(Mistake) as caught:
            found._theirs()
    for sentence in (*found.left_out, str(caught.value)):
        assert str(found.staging.path) not in sentence and tempfile.gettempdir() not in sentence.replace(str(tmp_path), "")


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: an error, not a signal
from research.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.exit(main(["import", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(500, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.slow), 100_000])
def test_a_disk_that_fills_is_one_sentence_and_leaves_nothing(size, folder, tmp_path):
    """In a table, in the tokenizer's file, and in the weights'."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    where = tree(tmp_path)
    command = [sys.executable, "-c", FULL.format(size=size), str(folder), "--as", str(where / "experiments" / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error  ") and "→" in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(where / "runs") == [] and sorted(os.listdir(where / "experiments")) == ["gpt_sotu"]
