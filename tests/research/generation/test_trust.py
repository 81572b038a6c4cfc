"""A run that this checkout has made may name files and programs; a copy of it may not, unless its user trusts it."""

import json
import shutil

import pytest

from parallel.errors import Mistake
from research.generation.trust import NOT_READ, trusted_settings
from research.tracking.own_runs import is_own, mark_as_own
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
    with pytest.raises(Mistake, match="data.train = .*train.txt' of copy-abcdef lies outside .* it is not read → .* --trust"):
        trusted_settings(copy)  # its tokenizer is made from that text
    assert trusted_settings(copy, trust=True).data == own.data
    change(copy, "data", train="builtin:state_of_the_union/val")
    assert (trusted_settings(copy).data.validation, trusted_settings(copy).data.cache) == (NOT_READ, ".cache")
    with pytest.raises(Mistake, match="data.validation = .*validation.txt"):
        trusted_settings(copy, reads=["validation"])
    shutil.copyfile(tmp_path / "validation.txt", copy.path / "held_out.txt")
    change(copy, "data", validation=str(copy.path / "held_out.txt"))
    assert trusted_settings(copy, reads=["validation"]).data.validation == str(copy.path / "held_out.txt")
    (copy.path / "held_out.txt").unlink()
    (copy.path / "held_out.txt").symlink_to(tmp_path / "validation.txt")  # a link in the folder leads out of it all the same
    with pytest.raises(Mistake, match="lies outside"):
        trusted_settings(copy, reads=["validation"])


def test_a_variant_is_a_program(tmp_path):
    """It is taken from an experiment of the checkout, from an own run, or on trust."""
    run = untrained.make(tmp_path, variant=VARIANT, norm="variant:Mine")
    assert trusted_settings(run).model.norm == "variant:Mine"
    copy = strangers(run, tmp_path)
    change(copy, "data", train="builtin:state_of_the_union/val")
    with pytest.raises(Mistake, match="model.norm = 'variant:Mine' is a class in .*variant.py, a program .* it is not executed"):
        trusted_settings(copy, root=tmp_path)
    assert trusted_settings(copy, trust=True).model.norm == "variant:Mine"
    (tmp_path / "experiments" / "known").mkdir(parents=True)
    (tmp_path / "experiments" / "known" / "variant.py").write_text(VARIANT)
    assert trusted_settings(copy, root=tmp_path).model.norm == "variant:Mine"
