"""The run that generate, evaluate and serve start from: its checkpoint, and errors in one sentence."""

import argparse

import pytest

from parallel.errors import Mistake
from research.cli import trained_run
from research.config import serialization
from research.tracking import run_folder
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained.make(tmp_path_factory.mktemp("trained"), steps=(3, 6))


def arguments(run, checkpoint=None, tensor=1, trust=False) -> argparse.Namespace:
    return argparse.Namespace(run=str(run.path), checkpoint=checkpoint, tensor=tensor, trust=False)


@pytest.mark.parametrize(("step", "name"), [(None, "step_000006"), (3, "step_000003"), (6, "step_000006")])
def test_the_newest_or_the_named_checkpoint(folder, step, name):
    parsed = arguments(folder, step)
    trained = trained_run.find(parsed)
    assert (trained.arguments, trained.folder, trained.checkpoint) == (parsed, folder, folder.checkpoints / name)
    assert trained.experiment == serialization.load(folder.config)


def test_an_experiments_name_means_its_newest_run_with_a_checkpoint_which_is_said(folder, capsys):
    failed = run_folder.create(folder.path.parent.parent, folder.name)
    run_folder.start(failed, layout="", precision="fp32", steps=6)
    run_folder.end(failed, run_folder.FAILED, "no text")
    assert trained_run.find(argparse.Namespace(run=str(folder.path.parent), checkpoint=None, tensor=1, trust=False)).folder == folder
    said = capsys.readouterr()
    which = f"{folder.path.parent} is {folder.title}, the newest run with a checkpoint; {failed.title} (failed) is newer and has none\n"
    assert (said.out, said.err) == ("", which)
    assert trained_run.find(arguments(folder)).folder == folder and capsys.readouterr() == ("", "")


def test_errors_are_one_sentence(folder):
    assert "has no checkpoint of step 4 → it has 3 and 6" in sentence(lambda: trained_run.find(arguments(folder, 4)))
    assert "--tensor 3 does not fit model.num_heads = 4" in sentence(lambda: trained_run.find(arguments(folder, tensor=3)))


@pytest.mark.parametrize("verb", ["generate", "evaluate", "serve"])
def test_a_launcher_is_refused(verb, monkeypatch):
    trained_run.refuse_launcher(verb)
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Mistake, match=f"{verb} starts its ranks itself → run it without a launcher: python -m research {verb} RUN"):
        trained_run.refuse_launcher(verb)
