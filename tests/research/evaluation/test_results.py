"""What a kept result depends on, beside its task's files: the model, the code of the tasks, and whether that is known at all."""

import dataclasses
import json

import pytest

from parallel.files import read_json, write_json
from research.cli import evaluate
from research.evaluation import results
from research.evaluation.results import Key, Result, Results
from research.evaluation.task import Metric
from research.tracking.own_runs import mark_as_own
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained

KEY = Key("lambada", {"limit": 5}, "data", "tokenizer", "model", "code", "fp32")
VARIANT = "from models.norm import RMSNorm\n\nclass Mine(RMSNorm):\n    pass\n"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return untrained.make(tmp_path, variant=VARIANT, norm="variant:Mine")


def kept(run: RunFolder) -> Results:
    return Results(run, run.checkpoints / "step_000003")


def result(key: Key = KEY, value: float = 0.5, **files: str) -> Result:
    return Result(key, (Metric("accuracy", value, 0.1),), 5, 1.0, 1, 8, "2026-01-31T12:00:00+00:00", files)


def known(run: RunFolder, capsys) -> bool:
    evaluate.main([str(run.path), "--tasks", "agreement", "--limit", "2", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["task"] == "agreement"
    return "known already: agreement" in captured.err


def test_an_edited_model_or_task_is_evaluated_again(run, capsys, monkeypatch, tmp_path):
    assert not known(run, capsys) and known(run, capsys)
    (run.source / "variant.py").write_text(VARIANT.replace("pass", "'''changed'''"))
    mark_as_own(run)
    assert not known(run, capsys) and known(run, capsys)
    settings = read_json(run.config)
    settings["model"]["norm_eps"] *= 2
    write_json(run.config, settings)
    mark_as_own(run)
    assert not known(run, capsys) and known(run, capsys)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a_task.py").write_text("")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "room" / "results.py"))
    assert not known(run, capsys) and known(run, capsys)
    (tmp_path / "room" / "a_task.py").write_text("# another metric\n")
    assert not known(run, capsys) and known(run, capsys)


def test_a_variant_file_that_the_model_does_not_name_is_no_part_of_it(tmp_path):
    found = set()
    for i, norm in enumerate(("rmsnorm", "rmsnorm", "variant:Mine", "variant:Mine")):
        run = untrained.make(tmp_path, variant=VARIANT + "#" * i, norm=norm)
        found.add(results.model_digest(run, evaluate.find(evaluate.parser().parse_args([str(run.path)])).experiment.model))
    assert len(found) == 3


def test_a_result_is_known_while_its_files_are_as_they_were(run, tmp_path):
    (tmp_path / "read.txt").write_text("x")
    kept(run).add(result(**results.with_digests([tmp_path / "read.txt"])))
    assert kept(run).known(KEY) and not kept(run).known(dataclasses.replace(KEY, code_sha256="other"))
    (tmp_path / "read.txt").write_text("y")
    assert kept(run).of(KEY) and not kept(run).known(KEY)
    (tmp_path / "read.txt").unlink()
    assert not kept(run).known(KEY)
    unknown = dataclasses.replace(KEY, data_sha256="")
    kept(run).add(result(unknown))
    assert kept(run).of(unknown) and not kept(run).known(unknown)


def test_results_of_an_older_schema_stay_and_are_not_known(run):
    kept(run).add(result())
    path = kept(run).path
    saved = read_json(path)
    old = {name: value for name, value in saved["results"][0].items() if name not in ("model_sha256", "code_sha256", "files")}
    write_json(path, {**saved, "schema": 1, "results": [old]})
    assert not kept(run).known(KEY) and len(kept(run).results) == 1
    kept(run).add(result(value=0.25))
    assert kept(run).known(KEY) and [one.metrics[0].value for one in kept(run).results] == [0.5, 0.25]
    assert read_json(path)["schema"] == 2


def test_two_processes_that_evaluate_at_once_keep_the_results_of_both(run: RunFolder) -> None:
    """Each has read the file before the other one has written it."""
    one, other, third = kept(run), kept(run), dataclasses.replace(KEY, task="third")
    one.add(result())
    other.add(result(dataclasses.replace(KEY, task="other")))
    one.add(result(third, 0.25))
    one.add(result(third, 0.75))
    found = kept(run)
    assert [each.key.task for each in found.results] == ["lambada", "other", "third"]
    assert found.of(third) == result(third, 0.75)
