"""`python -m research runs`: what is on the disk, nothing more, whatever else lies there, and what tells the runs apart."""

import io
import json
import sys

import pytest
from rich.cells import cell_len

from parallel.errors import Mistake
from parallel.files import read_json, write_json
from research.cli import runs
from research.config import serialization
from research.tracking import run_folder
from research.tracking.metrics import JsonLines
from research.tracking.streams import ESCAPING
from tests.research.helpers.example import example

LAYOUT = "pipe 1 × data 1 × tensor 2 · ZeRO-1"
OVERRIDES = [
    ["schedule.log_every", "10", "2"],
    ["optimizer.lr", "0.003", "0.001"],
    ["parallel.tensor", "1", "2"],
    ["seed", "1", "7"],
    ["track.mode", "auto", "offline"],
]


def settings(lr=0.003, seed=1, norm="layernorm"):
    """An experiment. Its question, where it is recorded and how much text a validation reads differ between seeds, but tell nothing."""
    own = {"question": f"{lr}?", "track": {"project": f"project {seed}"}, "schedule": {"validate_tokens": 4096 * seed}}
    return example(model={"norm": norm}, optimizer={"lr": lr}, seed=seed, **own)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three runs: one finished with two validations, one of the same experiment after an edit of its config.py, one just started."""
    monkeypatch.chdir(tmp_path)
    done, edited = (run_folder.create(tmp_path / "runs", "gpt") for _ in range(2))
    fresh = run_folder.create(tmp_path / "runs", "llama")
    for day, folder in enumerate((done, edited, fresh), 1):
        run_folder.start(folder, layout=LAYOUT, precision="bf16", steps=300, overrides=OVERRIDES if folder == done else [])
        write_json(folder.run, read_json(folder.run) | {"started": f"2026-01-0{day}T10:00:00+00:00"})
    serialization.save(settings(lr=0.001, seed=7), done.config)
    serialization.save(settings(norm="rmsnorm"), edited.config)
    file = JsonLines(done.metrics)
    for step, bits in ((150, 2.5), (300, 2.0213)):
        file.write({"progress/step": step, "progress/tokens": 100 * step, "train/loss": 5.0})
        file.write({"progress/step": step, "progress/tokens": 100 * step, "val/bits_per_byte": bits})
    run_folder.end(done, run_folder.FINISHED)
    run_folder.end(edited, run_folder.FAILED, "the loss is nan")
    return tmp_path / "runs"


def listed(capsys, *argv):
    runs.main(list(argv))
    return capsys.readouterr().out


def test_json_says_everything(root, capsys):
    done, edited, fresh = json.loads(listed(capsys, "--json"))
    assert (done["name"], done["title"], done["steps_done"], done["steps_planned"]) == ("gpt", f"gpt-{done['id']}", 300, 300)
    assert (done["bits_per_byte"], done["tokens"], done["seed"], done["train_loss"]) == (2.0213, 30_000, 7, 5.0)
    assert (done["status"], done["layout"], done["precision"]) == ("finished", LAYOUT, "bf16")
    assert done["overrides"] == OVERRIDES and edited["reason"] == "the loss is nan"
    assert (fresh["name"], fresh["steps_done"], fresh["bits_per_byte"], fresh["status"]) == ("llama", 0, None, "running")
    assert done["started"] < done["ended"] and fresh["ended"] is None


def test_json_comes_back_equal_where_the_output_is_ascii(root, monkeypatch):
    reason = 'a callback said “x” · loss é → 3 × "y"'
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    run_folder.end(folder, run_folder.FAILED, reason)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=ESCAPING)
    monkeypatch.setattr(sys, "stdout", stream)
    runs.main(["--json"])
    last = json.loads(stream.buffer.getvalue().decode("ascii"))[-1]
    assert last["reason"] == reason and last["layout"] == LAYOUT


def test_what_differs_are_overrides_and_what_config_py_has_changed(root, capsys):
    """Without what another column shows, and without where the run is recorded; a run of another experiment is not compared."""
    done, edited, fresh = [run["differs"] for run in json.loads(listed(capsys, "--json"))]
    assert done == ["model.norm layernorm", "optimizer.lr 0.003 → 0.001", "schedule.log_every 10 → 2"]
    assert edited == ["model.norm rmsnorm", "optimizer.lr 0.003"] and fresh == []


def test_a_run_of_an_older_schema_is_compared_as_it_would_be_resumed(root):
    """Schema 5 knew no `loss`: such a run had cross-entropy."""
    old, new = (run_folder.create(root, "focal") for _ in range(2))
    serialization.save(example(), old.config)
    written = read_json(old.config)
    del written["loss"]
    write_json(old.config, written | {"schema": 5})
    serialization.save(example(loss="variant:Focal"), new.config)
    found = [(folder, {"overrides": []}) for folder in (old, new)]
    runs.tell_apart(found)
    assert [run["differs"] for _, run in found] == [["loss cross_entropy"], ["loss variant:Focal"]]


def test_a_pipe_gets_tabs(root, capsys):
    head, done, edited, fresh = [line.split("\t") for line in listed(capsys, "--root", str(root)).splitlines()]
    assert tuple(head) == runs.COLUMNS
    assert done[1:6] == ["finished", "300/300", "30 k", "2.021", "7"]
    assert done[7:] == ["bf16", LAYOUT, "model.norm layernorm, optimizer.lr 0.003 → 0.001, schedule.log_every 10 → 2"]
    assert fresh[1:6] == ["running", "0/300", "0", "–", "–"] and edited[1] == "failed"


@pytest.mark.parametrize("width", [40, 80, 100, 140, 200])
def test_a_terminal_of_any_width_gets_everything(root, width):
    found = [(folder, runs.summarise(folder)) for folder in run_folder.every(root)]
    runs.tell_apart(found)
    rows = [runs.cells(run) for _, run in found]
    lines = [line.plain for line in runs.lines(rows, width)]
    assert all(cell_len(line) <= width for line in lines)
    words = " ".join(" ".join(lines).split())
    assert all(" ".join(cell.split()) in words for row in [runs.COLUMNS, *rows] for cell in row)
    assert len([line for line in lines if not line.startswith(" ")]) == 1 + len(rows)


def test_long_differences_are_wrapped_between_entries():
    row = ["gpt-1", "finished", "1/1", "9", "–", "1", "2026-01-01 10:00", "fp32", LAYOUT, "model.norm a → b, model.mlp c → d, seed e → f"]
    *_, first, second = [line.plain for line in runs.lines([row], 40)]
    assert (first, second) == ("    model.norm a → b, model.mlp c → d,", "    seed e → f")


@pytest.mark.parametrize("column", runs.COLUMNS)
def test_every_column_can_be_sorted_by(root, capsys, column):
    """Runs without a value come last in either direction."""
    key = runs.SORTED_BY[column]
    for argv, backwards in ((["--sort", column], False), (["--sort", column, "--reverse"], True)):
        values = [run[key] for run in json.loads(listed(capsys, "--json", *argv))]
        known = [value for value in values if value is not None]
        assert values[: len(known)] == sorted(known, reverse=backwards) and len(values) == 3


def test_an_unknown_column_is_a_sentence(root):
    with pytest.raises(Mistake, match="there is no column tokns → did you mean tokens"):
        runs.main(["--sort", "tokns"])
    with pytest.raises(Mistake, match="there is no column zzz → use run, status, "):
        runs.main(["--sort", "zzz"])


def test_wreckage_does_not_end_the_list(root, capsys):
    """Each damaged run is a row that says what is wrong with it; folders without a run.json are none."""
    for name, content in (("torn", '{"sta'), ("list", "[]"), ("nothing", "")):
        (root / "gpt" / name).mkdir()
        (root / "gpt" / name / "run.json").write_text(content)
    (root / "gpt" / "empty").mkdir()
    (root / "file").write_text("")
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    folder.config.write_text("{")
    found = {run["id"]: run for run in json.loads(listed(capsys, "--json"))}
    assert len(found) == 6 and sum(run["status"] == "unreadable" for run in found.values()) == 3
    assert "holds no JSON object but a list" in found["list"]["reason"] and found["list"]["differs"] == [found["list"]["reason"]]
    assert "is not JSON" in found["torn"]["reason"] and "torn" in listed(capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("steps", value) for value in ("300", -1, 2**70, 1.5, [])),
        *(("status", value) for value in (None, 7, {})),
        *(("started", value) for value in (None, 20260101, ["2026"])),
        *(("overrides", value) for value in ("ab", 3, [1, 2], [["lr"]], {"lr": 1})),
        *(("segments", value) for value in ("ab", 3, ["x"])),
        *(("layout", []), ("precision", 32), ("reason", {}), ("commit", 1), ("dirty", "yes"), ("ended", 0)),
    ],
)
def test_a_field_of_another_type_is_named(root, capsys, field, value):
    """The other runs are listed as before."""
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    write_json(folder.run, read_json(folder.run) | {field: value})
    *others, run = json.loads(listed(capsys, "--json"))
    run = next(run for run in [*others, run] if run["name"] == "llama")
    assert run["status"] == "unreadable" and f"run.json: {field}" in run["reason"] and "is not what a run writes" in run["reason"]
    assert [other["status"] for other in others if other["name"] == "gpt"].count("unreadable") == 0
    assert f"run.json: {field}" in listed(capsys)


def test_impossible_values_are_shown_as_they_are(root, capsys):
    """Dates that there are none of, and metrics that are no numbers, are no reason to leave a run out."""
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    for started in ("9999-99-99", "0001-01-01T00:00:00+23:59", "x" * 100_000):
        write_json(folder.run, read_json(folder.run) | {"started": started})
        JsonLines(folder.metrics).write({"progress/step": "x", "progress/tokens": 10**350, "val/bits_per_byte": {"a": 1}})
        assert "llama" in listed(capsys) and len(listed(capsys)) < 3000


def test_a_diverged_run_is_still_json(root, capsys):
    (folder,) = [folder for folder in run_folder.every(root) if folder.name == "llama"]
    JsonLines(folder.metrics).write({"progress/step": 7, "val/bits_per_byte": float("nan")})
    assert json.loads(listed(capsys, "--json"))[2]["bits_per_byte"] is None


def test_no_runs_says_how_to_make_one(tmp_path, capsys):
    assert "experiments/gpt_sotu/launch.py" in listed(capsys, "--root", str(tmp_path / "none"))
    assert listed(capsys, "--root", str(tmp_path / "none"), "--json") == "[]\n"
