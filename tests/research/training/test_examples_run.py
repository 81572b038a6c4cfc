"""Runs on samples of other kinds than windows of a stream: the same on every layout and from every resume point, and replayed."""

import json
from typing import Any

import pytest

from research.config import serialization
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training import replay
from tests.research.helpers.small_runs import DROPS, Stage, bits, stopped_in_step_6

CLOSE = 1e-5
"""Relative: what the order of additions changes between layouts in fp32."""
FIM = {"kind": "fill_in_middle", "rate": 0.9, "spm_rate": 0.5, "confine": True}
CASES: dict[str, dict[str, Any]] = {
    "packed": {"data": {"examples": "packed"}, "model": DROPS | {"position": "alibi"}},
    "fim": {"data": {"examples": FIM, "tokenizer": "builtin:bytes+fim"}, "model": {"seq_length": 48}},
}
LAYOUTS = (("dp2", 2, {}), ("pp2", 2, {"pipe": 2}), ("tp2", 2, {"tensor": 2}))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Its documents are short, so that many share a row of 16 tokens."""
    stage = Stage(tmp_path_factory.mktemp("examples"))
    for name in ("train", "validation"):
        words = (stage.place / f"{name}.txt").read_text().split()
        lines = (json.dumps({"text": " ".join(words[i : i + 1 + i % 5])}) for i in range(0, len(words), 4))
        (stage.place / f"{name}.jsonl").write_text("\n".join(lines))
    return stage


def settings(stage: Stage, case: str) -> dict[str, Any]:
    texts = {name: str(stage.place / f"{name}.jsonl") for name in ("train", "validation")}
    return CASES[case] | {"data": texts | CASES[case]["data"]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layouts_a_resume_and_a_replay_train_on_the_same_samples(stage: Stage, case: str) -> None:
    alone = stage.run(f"{case}_alone", **settings(stage, case))
    assert alone.codes == [0], alone.said
    for name, world, parallel in LAYOUTS:
        run = stage.run(f"{case}_{name}", world, parallel=parallel, **settings(stage, case))
        assert run.codes == [0] * world, run.said
        assert run.rows() == pytest.approx(alone.rows(), rel=CLOSE)

    # stopped after step 6 and resumed: bit for bit the run that never stopped; and on another layout, within rounding
    first = stage.run(f"{case}_resumed", prelude=stopped_in_step_6, **settings(stage, case))
    resumed = stage.run(f"{case}_resumed", resume=str(first.folder.path), **settings(stage, case))
    assert resumed.codes == [0] and resumed.hexes() == alone.hexes(), resumed.said
    assert bits(resumed.folder) == bits(alone.folder)
    second = stage.run(f"{case}_moved", prelude=stopped_in_step_6, **settings(stage, case))
    moved = stage.run(f"{case}_moved", 2, resume=str(second.folder.path), parallel={"tensor": 2}, **settings(stage, case))
    assert moved.codes == [0, 0] and moved.rows() == pytest.approx(alone.rows(), rel=CLOSE), moved.said

    # a step that is run again has the loss that was recorded
    assert replayed(alone.folder, 11) == pytest.approx(alone.rows()[11], rel=CLOSE)


def replayed(folder: RunFolder, step: int) -> float:
    """The loss of the step, run again."""
    _, found = replay.replay(folder, serialization.load(folder.config), step, Console())
    return found.loss
