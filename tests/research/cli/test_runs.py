"""`python -m research runs`: what is on the disk, nothing more, whatever else lies there."""

import io
import json

import pytest

from parallel.files import read_json, write_json
from research.cli import runs
from research.tracking import run_folder
from research.tracking.metrics import JsonLines


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two runs: one finished with two validations, one just started."""
    monkeypatch.chdir(tmp_path)
    done, fresh = run_folder.create(tmp_path / "runs", "gpt"), run_folder.create(tmp_path / "runs", "llama")
    for folder, started in ((done, "2026-01-01T10:00:00+00:00"), (fresh, "2026-01-02T10:00:00+00:00")):
        run_folder.start(folder, layout="pipe 1 × data 1 × tensor 2", precision="bf16", steps=300)
        write_json(folder.run, read_json(folder.run) | {"started": started})
    file = JsonLines(done.metrics)
    for step, bits in ((150, 2.5), (300, 2.0213)):
        file.write({"progress/step": step, "train/loss": 5.0})
        file.write({"progress/step": step, "val/bits_per_byte": bits})
    run_folder.end(done, run_folder.FINISHED)
    return tmp_path / "runs"


def listed(capsys, *argv):
    runs.main(list(argv))
    return capsys.readouterr().out


def test_json_says_everything(root, capsys):
    done, fresh = json.loads(listed(capsys, "--json"))
    assert (done["name"], done["steps_done"], done["steps_planned"], done["bits_per_byte"]) == ("gpt", 300, 300, 2.0213)
    assert (done["status"], done["layout"], done["precision"]) == ("finished", "pipe 1 × data 1 × tensor 2", "bf16")
    assert (fresh["name"], fresh["steps_done"], fresh["bits_per_byte"], fresh["status"]) == ("llama", 0, None, "running")
    assert done["started"] < done["ended"] and fresh["ended"] is None


def test_a_pipe_gets_tabs(root, capsys):
    head, done, fresh = [line.split("\t") for line in listed(capsys, "--root", str(root)).splitlines()]
    assert tuple(head) == runs.COLUMNS
    assert done[0] == "gpt" and done[3:] == ["pipe 1 × data 1 × tensor 2", "bf16", "300/300", "2.021", "finished"]
    assert fresh[-3:] == ["0/300", "–", "running"]


def test_a_terminal_gets_a_table(root):
    from rich.console import Console

    console = Console(width=120, record=True, force_terminal=True, file=io.StringIO())
    console.print(runs.table([runs.summarise(folder) for folder in run_folder.every(root)]))
    text = console.export_text()
    assert len(text.splitlines()) == 3 and "300/300" in text and "2.021" in text and "┃" not in text


def test_wreckage_is_passed_over(root, capsys):
    for name, content in (("torn", '{"sta'), ("list", "[]"), ("nothing", "")):
        (root / "gpt" / name).mkdir()
        (root / "gpt" / name / "run.json").write_text(content)
    (root / "gpt" / "empty").mkdir()
    (root / "file").write_text("")
    assert len(json.loads(listed(capsys, "--json"))) == 2


def test_a_diverged_run_is_still_json(root, capsys):
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    JsonLines(folder.metrics).write({"progress/step": 7, "val/bits_per_byte": float("nan")})
    assert json.loads(listed(capsys, "--json"))[1]["bits_per_byte"] is None


def test_no_runs_says_how_to_make_one(tmp_path, capsys):
    assert "experiments/gpt_sotu/launch.py" in listed(capsys, "--root", str(tmp_path / "none"))
    assert listed(capsys, "--root", str(tmp_path / "none"), "--json") == "[]\n"
