"""The verb evaluate: metrics equal the run's own, on one rank and two; results are kept and not computed twice; errors are one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from research.cli import evaluate
from research.cli.evaluate import format_value, summary_rows, table_rows
from research.evaluation import results
from research.evaluation import task as task_file
from research.evaluation.results import Key, Result
from research.evaluation.task import Metric
from research.tracking import metrics
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence
from tests.research.helpers.launches import ROOT, Ended

PAIRS = [
    {"sentence_good": f"the {a}", "sentence_bad": f"the {b}", "UID": a[0]} for a, b in (("people", "war"), ("union", "jobs"), ("war", "½"))
]
LIMIT = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("evaluate"), steps=(3, 6))


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    return path


def rows(capsys, folder: RunFolder, *words: str) -> dict[str, dict]:
    """The command's results by task."""
    evaluate.main([str(folder.path), *words, "--json"])
    return {row["task"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def value(row: dict, metric: str) -> float:
    return row["metrics"][metric]["value"]


def test_validation_is_the_run_s_own(tensor_2: Ended, tmp_path, capsys):
    """A run of two tensor ranks, evaluated on one rank, gives the last val/… metrics of its metrics.jsonl."""
    copied = RunFolder(tmp_path / "runs" / "gpt_sotu" / tensor_2.folder.id)  # other tests use the run's own folder
    shutil.copytree(tensor_2.folder.path, copied.path)
    (row,) = rows(capsys, copied, "--tasks", "validation").values()
    last = metrics.last(tensor_2.folder.metrics, ("val/loss", "val/ppl", "val/bits_per_byte"))
    assert value(row, "bits_per_byte") == pytest.approx(last["val/bits_per_byte"], abs=1e-6)
    assert value(row, "loss") == pytest.approx(last["val/loss"], abs=1e-6)
    assert value(row, "perplexity") == pytest.approx(last["val/ppl"], rel=1e-6)


def test_two_tensor_ranks_give_the_same_metrics(folder, pairs, capsys):
    words = ["--tasks", "validation", f"pairs:{pairs}", "--stride", "24", "--again"]
    one, two = rows(capsys, folder, *words), rows(capsys, folder, *words, "--tensor", "2", "--batch", "3")
    assert one.keys() == two.keys() and two["validation"]["tensor"] == 2
    for task in one:
        for metric in one[task]["metrics"]:
            assert value(two[task], metric) == pytest.approx(value(one[task], metric), rel=1e-5)


def test_a_known_task_is_not_run_again(folder, pairs, capsys, monkeypatch):
    task = f"pairs:{pairs}"
    first = rows(capsys, folder, "--tasks", task)
    saved = json.loads((folder.path / "evaluations" / "step_000006.json").read_text())
    assert saved["run"] == folder.title and first[task] in saved["results"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_evaluate", lambda *_: pytest.fail("it was run again"))
        assert rows(capsys, folder, "--tasks", task, "--tensor", "2") == first
    for words in (["--limit", "2"], ["--again"], ["--checkpoint", "3"], ["--precision", "bf16"]):
        other = rows(capsys, folder, "--tasks", task, *words)
        assert other[task] != first[task] or other[task]["ended"] >= first[task]["ended"]
    kept = json.loads((folder.path / "evaluations" / "step_000006.json").read_text())["results"]
    assert [row["precision"] for row in kept if row["task"] == task] == ["fp32", "fp32", "bf16"]
    pairs.write_text(pairs.read_text() + json.dumps(PAIRS[0]) + "\n")
    assert rows(capsys, folder, "--tasks", task)[task]["examples"] == 4


def test_results_of_a_checkpoint_that_was_replaced_are_dropped(folder, pairs, capsys):
    path = folder.path / "evaluations" / "step_000003.json"
    rows(capsys, folder, "--tasks", f"pairs:{pairs}", "--checkpoint", "3")
    path.write_text(path.read_text().replace('"manifest_sha256": "', '"manifest_sha256": "0'))
    rows(capsys, folder, "--tasks", "validation", "--limit", "1", "--checkpoint", "3")
    assert [row["task"] for row in json.loads(path.read_text())["results"]] == ["validation"]


def test_what_was_finished_is_kept(folder, pairs, capsys, monkeypatch):
    """Ctrl-C in the second task."""

    def interrupted(requests, *arguments):
        if len(requests.requests) == 4:  # the pairs
            raise KeyboardInterrupt
        return task_file.evaluate(requests, *arguments)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows(capsys, folder, "--tasks", "validation", f"pairs:{pairs}", "--limit", "2", "--window", "9")
    assert [json.loads(line)["task"] for line in capsys.readouterr().out.splitlines()] == ["validation"]
    assert {path.name for path in (folder.path / "evaluations").iterdir()} <= {"step_000003.json", "step_000006.json", ".lock"}


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_leaves_whole_files(folder, pairs, tmp_path):
    (tmp_path / "long.txt").write_text(untrained.TEXT * 400, encoding="utf-8")
    command = [sys.executable, "-m", "research", "evaluate", str(folder.path), "--tensor", "2"]
    command += ["--tasks", f"pairs:{pairs}", f"perplexity:{tmp_path}/long.txt"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True)
    assert process.stderr is not None
    while "perplexity" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "Traceback" not in err and "pairs.jsonl\taccuracy" in out and "long.txt" not in out
    kept = json.loads((folder.path / "evaluations" / "step_000006.json").read_text())["results"]
    assert not any("long.txt" in row["task"] for row in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "lambda"], "there is no task 'lambda' → did you mean lambada?"),
        (["--tasks", "validation,zzz"], "there is no task 'zzz'"),
        (["--tasks", "humanevl"], "there is no task 'humanevl' → did you mean humaneval?"),
        (["--limit", "0"], "--limit 0 does not work → use 1 or more"),
        (["--batch", "0"], "--batch 0 does not work → use 1 or more"),
        (["--fewshot", "-1"], "--fewshot -1 does not work → use 0 or more"),
        (["--stride", "33"], "--stride 33 does not work with a window of 33 tokens → use 1 to 32"),
        (["--tensor", "3"], "--tensor 3 does not fit model.num_heads = 4"),
        (["--checkpoint", "4"], "has no checkpoint of step 4 → it has 3 and 6"),
        (
            ["--tasks", "lm_eval:x", "--lm_eval_tasks", "nowhere"],
            "--lm_eval_tasks nowhere is not a folder → name one with the tasks' YAML files",
        ),
        (["--taks", "x"], "does not know --taks → did you mean --tasks?"),
    ],
)
def test_mistakes(folder, words, message):
    if "lm_eval:x" in words:
        pytest.importorskip("lm_eval")
    assert message in sentence(lambda: evaluate.main([str(folder.path), *words]))


def test_no_run():
    assert "evaluate needs a run → name one" in sentence(lambda: evaluate.main([]))


def test_a_damaged_results_file(folder, capsys):
    path = folder.path / "evaluations" / "step_000003.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    said = sentence(lambda: evaluate.main([str(folder.path), "--checkpoint", "3"]))
    assert f"{path} is not what an evaluation writes ({path} is not JSON (" in said
    assert said.endswith(" → move it away") and said.count("→") == 1
    assert sentence(lambda: results.every(folder)) == said
    path.unlink()


def test_the_list(capsys):
    evaluate.main(["--tasks", "list"])
    out = capsys.readouterr().out
    assert "validation" in out and "pairs:FILE" in out and "lm_eval:NAME" in out


def test_lm_eval_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = sentence(lambda: evaluate.main([str(folder.path), "--tasks", "lm_eval:x"]))
    assert message.endswith("is not installed → pip install -r requirements-eval.txt")


def result(task: str, **values: float) -> Result:
    key = Key(task, {"limit": 5, "stride": None}, "", "", "", "", "fp32")
    return Result(key, tuple(Metric(name, value, value / 10) for name, value in values.items()), 1200, 61.0, 1, 8, "")


def test_the_table():
    first, second = table_rows(result("lambada", accuracy=0.5, perplexity=12345.6))
    assert first == ("lambada (limit 5)", "accuracy", "0.5000", "0.0500", "1,200", "fp32", "1:01")
    assert second == ("", "perplexity", "12,345.6", "1,234.6", "", "", "")
    assert [format_value(value) for value in (None, float("nan"), float("inf"), 0.00004)] == ["", "nan", "inf", "0.0000"]


def test_names_in_the_summary_have_no_folder():
    assert summary_rows([result("pairs:a/b/c.jsonl", accuracy=0.5)]) == {"eval/pairs:c.jsonl (limit 5)/accuracy": 0.5}
