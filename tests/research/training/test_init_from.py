"""A run that begins with the weights of another: which checkpoint is taken, what is doubtful, and what training goes on with."""

import json
from pathlib import Path

import pytest

from research.config import schema, serialization
from research.tracking import run_folder
from research.tracking.run_folder import IMPORTED, RunFolder
from research.training import init_from
from research.training.resume import AUTO, find
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers.example import example, sentence
from tests.research.helpers.launches import Ended, Place, run


def imported(runs: Path, experiment) -> RunFolder:
    folder = run_folder.create(runs, "mine")
    serialization.save(experiment, folder.config)
    save(folder.checkpoints / "step_000000")
    run_folder.start(folder, layout="", precision="fp32", steps=0)
    run_folder.end(folder, IMPORTED)
    return folder


def test_a_checkpoint_is_taken_whatever_else_is_refused_with_the_one_meant(tmp_path: Path) -> None:
    folder = imported(tmp_path / "runs", example())
    name = f"runs/mine/{folder.id}"
    init_from.check_init_from(example(), tmp_path)
    init_from.check_init_from(example(init_from=f"{name}/checkpoints/step_000000"), tmp_path)
    init_from.check_init_from(example(init_from=str(folder.checkpoints / "step_000000")), Path("/elsewhere"))
    said = sentence(lambda: init_from.check_init_from(example(init_from=name), tmp_path))
    assert said.endswith(f"→ name {name}/checkpoints/step_000000") and f"init_from = '{name}'" in said
    assert sentence(lambda: init_from.check_init_from(example(init_from="nothing"), tmp_path)).endswith(
        "→ name runs/NAME/ID/checkpoints/step_N"
    )


def test_weights_that_know_other_tokens_are_doubtful(tmp_path: Path) -> None:
    """A built-in tokenizer of one name is another one if it is trained on another text; copies of a text or a file are the same."""
    for name, text in (("a.txt", "text"), ("copy.txt", "text"), ("b.txt", "other"), ("t.json", "{}"), ("u.json", "{}"), ("v.json", "[]")):
        (tmp_path / name).write_text(text)
    folder = tmp_path / "runs" / "old" / "aaaaaa"
    folder.mkdir(parents=True)

    def said(then: dict, now: dict) -> list[str]:
        texts = {"train": "a.txt", "validation": "b.txt", "tokenizer": "builtin:bpe-300"}
        serialization.save(example(data=schema.Data(**texts | then)), folder / "config.json")
        name = "runs/old/aaaaaa/checkpoints/step_000006"
        return list(init_from.doubts_of_init_from(example(data=schema.Data(**texts | now), init_from=name), tmp_path))

    for then, now in (({}, {}), ({}, {"train": "copy.txt"}), ({"tokenizer": "t.json"}, {"tokenizer": "u.json", "train": "b.txt"})):
        assert said(then, now) == []
    assert said({}, {"train": "b.txt"}) == [
        "init_from = 'runs/old/aaaaaa/checkpoints/step_000006': its weights know the tokens of 'builtin:bpe-300' trained on 'a.txt', not "
        "on 'b.txt', so that the ids mean other text → set data.tokenizer to the tokenizer.json that `python -m research export` writes "
        "for that run"
    ]
    (other,) = said({"tokenizer": "t.json"}, {"tokenizer": "v.json"})
    assert "know the tokens of 't.json', not 'v.json', so that" in other
    assert len(said({"train": "gone.txt"}, {})) == 1
    (folder / "config.json").unlink()
    assert list(init_from.doubts_of_init_from(example(init_from="runs/old/aaaaaa/checkpoints/step_000006"), tmp_path)) == []


def test_ranks_compare_the_weights_they_begin_with(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", offset=1.0)
    digests = [init_from.init_from_digest(example(init_from=where), tmp_path) for where in ("a", "b", "c")]
    assert len(set(digests)) == 3 and digests[2] == "missing" and init_from.init_from_digest(example(), tmp_path) == "drawn"


def test_what_was_imported_is_begun_with_not_resumed(tmp_path: Path) -> None:
    folder = imported(tmp_path / "runs", example())
    assert find(AUTO, example(), Path("mine"), tmp_path / "runs") == (None, "a new run: mine has no unfinished run with a checkpoint")
    said = sentence(lambda: find(str(folder.path), example(), Path("mine"), tmp_path / "runs"))
    assert said.startswith(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out")


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another_on_another_layout(place: Place, alone: Ended) -> None:
    """At a learning rate of nothing its validations are the last one of the run it begins with; its steps count from 1."""
    start = alone.folder.checkpoints / "step_000006"
    still = dict(optimizer__lr=1e-12, optimizer__min_lr=1e-13, optimizer__weight_decay=0.0)
    ended = run(place, "deepspeed", 2, parallel__tensor=2, init_from=start, **still)
    assert ended.code == 0, ended.err
    assert f"weights  {start} · step 6" in ended.out
    losses, last = ended.column("val/loss"), alone.column("val/loss")[-1]
    assert losses == pytest.approx([last] * 2, rel=1e-5)
    assert [row["progress/step"] for row in ended.rows("val/loss")] == [3, 6]
    assert abs(last - alone.column("val/loss")[0]) > 0.01  # else the drawn weights might do
    assert json.loads(ended.folder.config.read_text())["init_from"] == str(start)
