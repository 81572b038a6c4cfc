"""A run that this checkout has made may name files and programs; a copy of it may not, unless its user trusts it."""

import io
import json
import shutil
import subprocess
from argparse import Namespace

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cli.cluster import checked_job
from research.cli.trained_run import settings_of_run
from research.config import Evaluate, Profile, Track
from research.config.experiment_folder import load
from research.data.tokenizer import gpt2
from research.generation.trust import NOT_READ, said_of_trust, trusted_settings
from research.tracking.console import Console
from research.tracking.own_runs import KEY, is_own, mark_as_own
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained

VARIANT = "from models.norm import RMSNorm\n\n\nclass Mine(RMSNorm):\n    pass\n"


def strangers(run: RunFolder, place) -> RunFolder:
    """A copy, as if it had come from elsewhere."""
    shutil.copytree(run.path, place / "copy" / "abcdef")
    copy = RunFolder(place / "copy" / "abcdef")
    (copy.path / "made_here").unlink()
    return copy


def change(run: RunFolder, group: str, **settings) -> None:
    table = json.loads(run.config.read_text())
    table[group].update(settings)
    run.config.write_text(json.dumps(table))


def test_a_run_is_own_while_its_settings_and_its_variant_are_as_written(tmp_path):
    run, key = untrained.make(tmp_path, variant=VARIANT), tmp_path / "key"
    mark_as_own(run, key)
    assert is_own(run, key) and not is_own(run, tmp_path / "other") and key.stat().st_mode & 0o077 == 0
    for path in (run.config, run.source / "variant.py"):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert not is_own(run, key)
        path.write_bytes(before)
    assert is_own(run, key)
    mark = (run.path / "made_here").read_text()
    mark_as_own(run, tmp_path / "other")  # another checkout has another key
    assert (run.path / "made_here").read_text() != mark and not is_own(run, key)


def test_texts_and_cache_of_a_strangers_run(tmp_path):
    run = untrained.make(tmp_path)
    own = trusted_settings(run)
    assert own.data.train == str(tmp_path / "train.txt") and own.data.cache == str(tmp_path / "cache")
    copy = strangers(run, tmp_path)
    with pytest.raises(Mistake, match="data.train = .*train.txt' of copy-abcdef is a file, .* it is not read, .* --trust"):
        trusted_settings(copy)  # its tokenizer is made from that text
    assert trusted_settings(copy, trust=True).data == own.data
    change(copy, "data", train="builtin:state_of_the_union/val")
    assert (trusted_settings(copy).data.validation, trusted_settings(copy).data.cache) == (NOT_READ, ".cache")
    with pytest.raises(Mistake, match="data.validation = .*validation.txt"):
        trusted_settings(copy, reads=["validation"])
    change(copy, "data", validation="split:0.1")
    assert trusted_settings(copy, reads=["validation"]).data.validation == "split:0.1", "a part of a built-in text"
    change(copy, "data", train="store:/etc/passwd", tokenizer="builtin:gpt2")
    assert (trusted_settings(copy).data.train, trusted_settings(copy).data.validation) == (NOT_READ, NOT_READ)
    with pytest.raises(Mistake, match="data.validation = 'split:0.1' of copy-abcdef is a part of a file, .* it is not read"):
        trusted_settings(copy, reads=["validation"])
    with pytest.raises(Mistake, match="data.train = 'store:/etc/passwd' of copy-abcdef is a file, .* it is not read"):
        trusted_settings(copy, reads=["train"])
    change(copy, "data", train="builtin:state_of_the_union/val")
    (copy.path / "held_out.jsonl.xz").write_bytes(b"")  # it may unpack to any size
    change(copy, "data", validation=str(copy.path / "held_out.jsonl.xz"))
    with pytest.raises(
        Mistake, match=r"data.validation = .*held_out.jsonl.xz' of copy-abcdef is a file, not a built-in text: it is not read"
    ):
        trusted_settings(copy, reads=["validation"])


def test_a_tokenizer_of_a_strangers_run_lies_in_its_folder(tmp_path):
    copy = strangers(untrained.make(tmp_path), tmp_path)
    gpt2().backend.save(str(copy.path / "tokenizer.json"))
    change(copy, "data", tokenizer=str(copy.path / "tokenizer.json"))
    assert trusted_settings(copy).data.tokenizer == str(copy.path / "tokenizer.json")
    (copy.path / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (copy.path / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")  # a link in the folder leads out of it all the same
    with pytest.raises(Mistake, match="data.tokenizer = .* lies outside of its folder"):
        trusted_settings(copy)


def test_what_a_strangers_run_says_of_deepspeed_and_of_initial_weights(tmp_path):
    """`replay` makes an engine and may begin with init_from. Other verbs get neither, nor what only a training run uses."""
    run = untrained.make(tmp_path)
    elsewhere = str(tmp_path / "elsewhere")
    table = json.loads(run.config.read_text())
    table |= {"deepspeed": {"csv_monitor": {"enabled": True, "output_path": elsewhere}}, "init_from": elsewhere}
    table["evaluate"] |= {"tasks": ["blimp"], "data": elsewhere, "measure": "variant:Mine"}
    table["track"] |= {"runs": elsewhere, "project": "theirs", "mode": "online"}
    table["profile"] |= {"steps": "1-2"}
    table["data"] |= dict.fromkeys(("train", "validation"), "builtin:state_of_the_union/val")
    run.config.write_text(json.dumps(table))
    copy = strangers(run, tmp_path)
    settings = trusted_settings(copy)
    assert (settings.deepspeed, settings.init_from, settings.data.cache) == ({}, None, ".cache")
    assert (settings.evaluate, settings.track, settings.profile) == (Evaluate(), Track(), Profile())
    assert elsewhere not in settings.model_dump_json()
    assert trusted_settings(copy, trust=True, trains=True).deepspeed == table["deepspeed"]
    table["evaluate"]["measure"] = None
    copy.config.write_text(json.dumps(table))
    with pytest.raises(Mistake, match="deepspeed = 'csv_monitor' of copy-abcdef can make DeepSpeed write files anywhere: it is not"):
        trusted_settings(copy, trains=True)
    copy.config.write_text(json.dumps(table | {"deepspeed": {}}))
    with pytest.raises(Mistake, match="init_from = .*elsewhere' of copy-abcdef lies outside of its folder: it is not read"):
        trusted_settings(copy, trains=True)
    own = str(copy.checkpoints / "step_000003")
    copy.config.write_text(json.dumps(table | {"deepspeed": {}, "init_from": own}))
    assert trusted_settings(copy, trains=True).init_from == own


def test_a_run_is_trusted_once(tmp_path, capsys):
    """--trust writes the mark and says so. A link in the mark's place is not followed, and a read-only folder is said."""
    copy = strangers(untrained.make(tmp_path), tmp_path)
    refused = "it is not read, because this run has no mark of this checkout .* → if it is yours, add --trust; in Python: api.load"
    with pytest.raises(Mistake, match=refused):
        settings_of_run(Namespace(trust=False), copy)
    (tmp_path / "victim").write_text("kept")
    (copy.path / "made_here").symlink_to(tmp_path / "victim")
    settings_of_run(Namespace(trust=True), copy)
    assert "copy-abcdef counts as a run of this checkout from now on" in capsys.readouterr().err
    assert is_own(copy) and (tmp_path / "victim").read_text() == "kept"
    settings_of_run(Namespace(trust=False), copy)
    settings_of_run(Namespace(trust=True), copy)
    assert capsys.readouterr().err == ""


def test_a_mark_that_cannot_be_written_is_no_mark(tmp_path):
    copy = strangers(untrained.make(tmp_path), tmp_path)
    assert not mark_as_own(copy, tmp_path / "train.txt" / "key") and not is_own(copy)
    (copy.path / "made_here").mkdir()
    assert not mark_as_own(copy) and "for this time only" in said_of_trust(copy)
    assert [path.name for path in copy.path.glob(".made_here*")] == []


def test_the_key_outlives_make_clean():
    """It is no part of a commit either."""
    removed = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert KEY.parent == ROOT and ".cache" in removed and KEY.name not in removed
    assert (ROOT / ".gitignore").read_text().count(f"/{KEY.name}*\n") == 1


def test_a_variant_is_a_program(tmp_path):
    """It is taken from an experiment of the checkout, from an own run, or on trust."""
    run = untrained.make(tmp_path, variant=VARIANT, norm="variant:Mine")
    assert trusted_settings(run).model.norm == "variant:Mine"
    copy = strangers(run, tmp_path)
    change(copy, "data", train="builtin:state_of_the_union/val")
    with pytest.raises(Mistake, match="model.norm = 'variant:Mine' of copy-abcdef is a class in .*variant.py, a program .* not executed"):
        trusted_settings(copy, root=tmp_path)
    assert trusted_settings(copy, trust=True).model.norm == "variant:Mine"
    (tmp_path / "experiments" / "known").mkdir(parents=True)
    (tmp_path / "experiments" / "known" / "variant.py").write_text(VARIANT)
    assert trusted_settings(copy, root=tmp_path).model.norm == "variant:Mine"


def test_only_what_is_executed_is_refused(tmp_path, capsys):
    """The loss of a run is a class of its variant.py: it is executed where a step is trained again, and nowhere else."""
    run = untrained.make(tmp_path, variant="class Mine: pass\n")
    table = json.loads(run.config.read_text()) | {"loss": "variant:Mine"}
    table["data"] |= dict.fromkeys(("train", "validation"), "builtin:state_of_the_union/val")
    run.config.write_text(json.dumps(table))
    copy = strangers(run, tmp_path)
    assert trusted_settings(copy).loss == "variant:Mine"
    with pytest.raises(Mistake, match="loss = 'variant:Mine' of copy-abcdef is a class in"):
        trusted_settings(copy, trains=True)
    settings_of_run(Namespace(trust=True), copy)
    assert "executed" not in capsys.readouterr().err
    (copy.path / "made_here").unlink()
    settings_of_run(Namespace(trust=True), copy, trains=True)
    assert "variant.py is executed" in capsys.readouterr().err


def test_a_training_run_without_a_mark_warns_in_its_header(tmp_path):
    from research.training import setup

    job = checked_job(load(ROOT / "experiments" / "gpt_sotu"), [], "torchrun", 1, 1)
    run = untrained.make(tmp_path)
    for folder, warned in ((run, 0), (strangers(run, tmp_path), 1)):
        shown = io.StringIO()
        setup.header(job, folder, Console(shown))
        assert shown.getvalue().count("the run's mark could not be written, so verbs that use the run will need --trust") == warned
