"""Runs on several sources: the same on every layout and from every resume point, also where weights change, with a validation of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.cli import data
from research.config import serialization
from research.training.sampler import blend_of
from tests.research.helpers.small_runs import Stage, bits, stopped_in_step_6

WEIGHTS = [("a", 3.0, 0), ("b", 1.0, 0), ("a", 0.5, 4), ("b", 1.5, 4)]
"""(name, weight, from_step). Ten steps of four samples each."""
LATER = [("c", 1.0, 8), ("a", 0.0, 8)]
CLOSE = 1e-5
"""Relative: what the order of additions changes between layouts in fp32."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Three sources that have nothing but their language in common."""
    stage = Stage(tmp_path_factory.mktemp("blend"))
    text = (stage.place / "train.txt").read_text()
    for i, name in enumerate("abc"):
        (stage.place / f"{name}.txt").write_text(text[i * 12_000 : (i + 1) * 12_000])
    return stage


def settings(stage: Stage, weights: list[tuple[str, float, int]], **changes: Any) -> dict[str, Any]:
    train = [{"path": str(stage.place / f"{name}.txt"), "weight": weight, "from_step": step} for name, weight, step in weights]
    return {"data": {"train": train, "tokenizer": "builtin:bytes", **changes}, "schedule": {"steps": 10, "batch_size": 4}}


@pytest.mark.slow
def test_layouts_and_a_resume_read_the_same_samples(stage: Stage, capsys: pytest.CaptureFixture) -> None:
    alone = stage.run("alone", **settings(stage, WEIGHTS))
    assert alone.codes == [0], alone.said
    for name, world, parallel in (("dp2", 2, {}), ("pp2", 2, {"pipe": 2}), ("tp2", 2, {"tensor": 2})):
        run = stage.run(name, world, parallel=parallel, **settings(stage, WEIGHTS))
        assert run.codes == [0] * world, run.said
        assert run.rows() == pytest.approx(alone.rows(), rel=CLOSE)

    # stopped after step 6 and resumed: nothing is lost or repeated
    first = stage.run("resumed", prelude=stopped_in_step_6, **settings(stage, WEIGHTS))
    resumed = stage.run("resumed", resume=str(first.folder.path), **settings(stage, WEIGHTS))
    assert resumed.codes == [0] and "bit for bit as if it had never stopped" in resumed.said, resumed.said
    assert resumed.hexes() == alone.hexes() and bits(resumed.folder) == bits(alone.folder)

    # `data` names the sources that the blend gives
    blend, names = blend_of(serialization.load(alone.folder.config)), []
    data.main([str(alone.folder.path), "--step", "5", "--json"])
    for sample in json.loads(capsys.readouterr().out)["samples"]:
        names.append(Path(sample["documents"][0]["source"]).stem)
    first_sample = 4 * 4
    assert names == [blend.names[source] for source in blend.place(np.arange(first_sample, first_sample + 4)).sources]


@pytest.mark.slow
def test_weights_and_sources_that_begin_later_may_be_added_to_a_run(stage: Stage) -> None:
    """Resumed with them, it is the run that was begun with them, to the last bit; what would change a step so far is refused."""
    begun = stage.run("begun", **settings(stage, [*WEIGHTS, *LATER]))
    assert begun.codes == [0], begun.said
    first = stage.run("added", prelude=stopped_in_step_6, **settings(stage, WEIGHTS))
    for weights in ([*WEIGHTS[:2], ("a", 0.6, 4), WEIGHTS[3]], [*WEIGHTS, ("c", 1.0, 5)], WEIGHTS[::-1]):
        refused = stage.run("added", resume=str(first.folder.path), **settings(stage, weights))
        assert refused.codes == [2] and "cannot go on with data.train" in refused.said, refused.said
    added = stage.run("added", resume=str(first.folder.path), **settings(stage, [*WEIGHTS, *LATER]))
    assert added.codes == [0] and "bit for bit as if it had been begun with these weights of the sources" in added.said, added.said
    assert added.hexes() == begun.hexes() and bits(added.folder) == bits(begun.folder)

    again = stage.run(
        "added", resume=str(added.folder.path), **settings(stage, [*WEIGHTS, *LATER]) | {"schedule": {"steps": 12, "batch_size": 4}}
    )
    assert again.codes == [0], again.said


@pytest.mark.slow
def test_each_source_is_validated_as_if_it_were_the_only_held_out_text(stage: Stage) -> None:
    own = str(stage.place / "c.txt")
    sources = settings(stage, WEIGHTS)
    sources["data"]["train"][1]["validation"] = own
    mixed = stage.run("own", **sources)
    assert mixed.codes == [0], mixed.said
    alone = stage.run("only", **settings(stage, WEIGHTS, validation=own))
    shared = stage.run("shared", **settings(stage, WEIGHTS))
    for key in ("loss", "ppl", "bits_per_byte", "tokens"):
        assert mixed.hexes(f"val/b/{key}") == alone.hexes(f"val/{key}") != {}
        assert mixed.hexes(f"val/{key}") == shared.hexes(f"val/{key}") != {}

    split = stage.run("split", **settings(stage, WEIGHTS, validation="split:0.2"))
    assert split.codes == [0], split.said
    parts = [split.rows(f"val/{name}/loss")[10] * split.rows(f"val/{name}/tokens")[10] for name in "ab"]
    tokens = sum(split.rows(f"val/{name}/tokens")[10] for name in "ab")
    assert split.rows("val/tokens")[10] == tokens and split.rows("val/loss")[10] == pytest.approx(sum(parts) / tokens, rel=1e-12)

    blend, length = blend_of(serialization.load(mixed.folder.config)), 16
    for place, name in enumerate(blend.names):
        windows = ((stage.place / f"{name}.txt").stat().st_size + 1 - 1) // length  # a token for each byte and one at the end
        assert mixed.rows(f"data/{name}/epochs")[10] == pytest.approx(blend.before(40)[place] / windows)
