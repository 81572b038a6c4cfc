"""Runs of an encoder: the same on every layout and from every resume point, stopped, moved, replayed and validated as a GPT's are."""

from typing import Any

import pytest

from research.config import serialization
from research.tracking.console import Console
from research.training import replay
from tests.research.helpers.small_runs import DROPS, Stage, bits, stopped_in_step_6

CLOSE = 1e-5
"""Relative: what the order of additions changes between layouts in fp32."""
EXPERIMENTS = {"bert": "bert_sotu", "t5": "t5_sotu"}
LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("dp2", 2, {}),
    ("zero3", 2, {"zero_stage": 3}),
    ("pp2", 2, {"pipe": 2}),
    ("tp2_sequence", 2, {"tensor": 2, "sequence": True}),
)
SETTINGS: dict[str, dict[str, Any]] = {"model": DROPS, "schedule": {"validate_every": 6}}
KEYS = ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte")


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_layouts_a_resume_and_a_replay_train_alike(kind: str, tmp_path) -> None:
    stage = Stage(tmp_path, EXPERIMENTS[kind])
    alone = stage.run("alone", **SETTINGS)
    assert alone.codes == [0], alone.said
    assert list(alone.rows("val/loss")) == [6, 12] and alone.rows()[12] < alone.rows()[1]
    assert ("research generate" in alone.said) == (kind == "t5") and not alone.folder.samples.read_text()
    for name, world, parallel in LAYOUTS:
        run = stage.run(name, world, parallel=parallel, **SETTINGS)
        assert run.codes == [0] * world, run.said
        for key in KEYS:
            assert run.rows(key) == pytest.approx(alone.rows(key), rel=CLOSE if key != "train/grad_norm" else 1e-4), (name, key)

    # stopped after step 6 and resumed: bit for bit the run that never stopped; and on another layout, within rounding
    first = stage.run("resumed", prelude=stopped_in_step_6, **SETTINGS)
    resumed = stage.run("resumed", resume=str(first.folder.path), **SETTINGS)
    assert resumed.codes == [0] and all(resumed.hexes(key) == alone.hexes(key) for key in KEYS), resumed.said
    assert bits(resumed.folder) == bits(alone.folder)
    second = stage.run("moved", 2, prelude=stopped_in_step_6, parallel={"pipe": 2}, **SETTINGS)
    moved = stage.run("moved", 2, resume=str(second.folder.path), parallel={"tensor": 2}, **SETTINGS)
    assert moved.codes == [0, 0] and moved.rows() == pytest.approx(alone.rows(), rel=CLOSE), moved.said

    # a step that is run again has the loss that was recorded, and the speed is that of the tokens in the column beside it
    _, found = replay.replay(alone.folder, serialization.load(alone.folder.config), 11, Console())
    assert found.loss == pytest.approx(alone.rows()[11], rel=CLOSE)
    tokens, speed, step_ms = (alone.rows(key) for key in ("progress/tokens", "perf/tokens_per_second", "perf/step_ms"))
    assert speed[12] * step_ms[12] / 1e3 == pytest.approx(tokens[12] - tokens[11], rel=1e-6)
