"""`diff`: two experiments, runs or checkpoints in any mix; what was put in is found, and nothing of a run is executed."""

import json
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from parallel.checkpoint.writer import write
from research.ablation import difference
from research.ablation.difference import compare
from research.cli import diff as verb
from research.config import serialization
from research.config.experiment_folder import load
from research.tracking import run_folder
from research.tracking.run_folder import RunFolder
from tests.research.helpers.example import sentence


@pytest.fixture
def place(experiments: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(difference.find, "__defaults__", (experiments,))
    return experiments.parent


def run_of(place: Path, name: str, variant: str | None = None, **settings) -> RunFolder:
    """A run of the experiment `name` with other settings, without a checkpoint."""
    folder = run_folder.create(place / "runs", name)
    saved = serialization.resolved(load(place / "experiments" / name).experiment)
    for setting, value in settings.items():
        group, _, key = setting.rpartition("__")
        (saved[group] if group else saved)[key] = value
    folder.config.write_text(json.dumps(saved))
    run_folder.start(folder, layout="", precision="fp32", steps=1, commit="abc1234", dirty=True)
    folder.source.mkdir()
    (folder.source / "config.py").write_text("raise RuntimeError('executed')\n")
    if variant is not None:
        (folder.source / "variant.py").write_text(variant)
    return folder


def found(x: str | Path, y: str | Path) -> dict:
    """What --json has of two sides."""
    sides = difference.find(str(x)), difference.find(str(y))
    return verb.as_json(*sides, compare(*sides))


def changes(shown: dict, part: str) -> dict:
    return {row["name"]: (row["x"], row["y"]) for row in shown[part]}


def test_a_folder_and_its_run_with_overrides(place: Path) -> None:
    run = run_of(place, "gpt_sotu", optimizer__lr=0.1, seed=7, parallel__tensor=2, track__tags=["a"])
    shown = found("experiments/gpt_sotu", run.path)
    assert changes(shown, "science") == {"optimizer.lr": (0.003, 0.1), "seed": (1, 7)} and shown["affects_results"]
    assert changes(shown, "plumbing") == {"parallel.tensor": (1, 2), "track.tags": ([], ["a"])}
    assert (shown["x"]["kind"], shown["y"]["kind"], shown["y"]["label"]) == ("experiment", "run", run.title)
    assert shown["y"]["commit"] == "abc1234 (changed)" and shown["variant"] is None
    for handle in (run.title, "gpt_sotu", run.path / "source", run.path.parent / "latest"):  # source/config.py is not executed
        assert found("experiments/gpt_sotu", handle)["y"]["label"] == run.title
    assert found("gpt_sotu_dyt", "gpt_sotu_3d")["x"]["kind"] == "experiment"  # they have no runs


def test_code_is_part_of_the_science_if_a_setting_names_any_of_it(place: Path) -> None:
    text = (place / "experiments/gpt_sotu_dyt/variant.py").read_text()
    run = run_of(place, "gpt_sotu_dyt", text.replace("ALPHA = 0.5", "ALPHA = 0.9"))
    shown = found("experiments/gpt_sotu_dyt", run.path)
    assert changes(shown, "science") == {"variant.py": ("25 lines", "25 lines")}
    assert [line for line in shown["variant"].split("\n") if line[1:].startswith("ALPHA = ")] == ["-ALPHA = 0.5", "+ALPHA = 0.9"]
    assert not found(run.path, run.path)["affects_results"]
    unused = run_of(place, "gpt_sotu", "unused = 1\n")
    shown = found("experiments/gpt_sotu", unused.path)
    assert not shown["affects_results"] and "+unused = 1" in shown["variant"]


def test_checkpoints_say_which_data_and_code_they_come_from(place: Path) -> None:
    run = run_of(place, "gpt_sotu_3d")
    paths = [run.checkpoints / f"step_00000{step}" for step in (3, 5)]
    facts = {"commit": "1234567", "code": "c" * 64, "machine": {"torch": "2.0", "deepspeed": "0.1", "world": 2}}
    for step, path, data in zip((3, 5), paths, ("d" * 64, "e" * 64), strict=True):
        write(path, {"head.weight": (2, 2)}, [torch.zeros(2, 2)], {"step": step, "samples": 0, "tokens": 0, "data": data, **facts})
    shown = found(paths[0], paths[1])
    assert changes(shown, "origin") == {"step": ("3", "5"), "data": ("d" * 16, "e" * 16)}
    assert shown["affects_results"] and shown["science"] == []
    assert shown["x"]["torch"] == "2.0" and shown["x"]["label"] == f"{run.title}/step_000003"
    shown = found(paths[1], run.path)
    assert changes(shown, "origin") == {"step": ("5", None), "commit": ("1234567", "abc1234 (changed)")}
    assert not shown["affects_results"]
    assert changes(found("experiments/gpt_sotu", run.path), "origin")["data"] == (None, "e" * 16)


def test_a_stranger_s_run_steers_no_terminal_and_lines_fit(place: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_of(
        place, "gpt_sotu", "x = '\x1b]0;title\x07'\n" * 2, question="\x1b[31m" + "long " * 100, track__project="\u202e" + "x" * 300
    )
    verb.main(["experiments/gpt_sotu", str(run.path)])
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\u202e" not in output and "\\x1b[31m" in output
    tables = output.partition("--- ")[0]
    assert max(map(cell_len, tables.splitlines())) <= 80


def test_exit_codes(place: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_of(place, "gpt_sotu", seed=2)
    verb.main(["experiments/gpt_sotu", str(run.path)])
    verb.main(["experiments/gpt_sotu", "experiments/gpt_sotu_3d", "--exit-code"])
    assert "same     no setting that affects results differs" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        verb.main(["experiments/gpt_sotu", str(run.path), "--exit-code", "--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["science"] == [{"name": "seed", "x": 1, "y": 2}]


def test_what_is_nothing_of_the_three_is_a_sentence(place: Path) -> None:
    assert "did you mean experiments/llama_sotu?" in sentence(lambda: difference.find("experiments/lama_sotu"))
    assert "there is no run folder nowhere" in sentence(lambda: difference.find("nowhere"))
    run = run_of(place, "gpt_sotu")
    run.config.write_text("{")
    assert "config.json" in sentence(lambda: difference.find(str(run.path)))
