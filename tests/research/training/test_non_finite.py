"""A gradient that is not finite stops a run before the update and names the rank, or is skipped, but not without end."""

import json
import math

import pytest

from research.training.anomalies import load as incident_of
from tests.research.helpers import small_runs as r
from tests.research.helpers.small_runs import Stage, bits
from tests.research.training.test_resume import go


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


SKIPPING = [("1", "fp32"), ("DP2", "bf16"), ("ZeRO-3", "fp32"), ("ZeRO-2", "bf16"), ("ZeRO-3", "bf16"), ("PP2", "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "precision"), [("DP2", "fp32"), ("TP2", "bf16")])
def test_nan_in_one_ranks_gradient_stops_before_the_update_and_names_the_rank(stage: Stage, layout: str, precision: str) -> None:
    name = f"nan_{layout}_{precision}"
    ended = go(stage, name, layout, precision, prelude=r.nan_gradient_in_step_5)
    assert set(ended.codes) == {3}, ended.said
    assert "error  step 5" in ended.said and "stopped before the update" in ended.said
    found = incident_of(ended.folder, 5)
    assert [(s.rank, s.parameters) for s in found.suspects] == [(1, ["blocks.1.mlp.up.weight"])]
    assert (found.samples, found.checkpoint, len(found.windows)) == ((32, 40), "step_000003", 8)
    assert all(value != b"" for value in bits(ended.folder).values())
    resumed = go(stage, name, layout, precision, resume="auto")
    assert set(resumed.codes) == {0}, resumed.said
    assert all(math.isfinite(loss) for step, loss in resumed.rows().items() if step != 5)
    assert resumed.rows("progress/applied_steps")[12] == 11


@pytest.mark.parametrize(
    ("layout", "precision"),
    [pytest.param(*pair, marks=pytest.mark.slow) for pair in [("PP2", "bf16"), *SKIPPING]],
)
def test_skips_in_a_row_have_a_cap_in_every_precision(stage: Stage, layout: str, precision: str) -> None:
    name = f"cap_{layout}_{precision}"
    ended = go(stage, name, layout, precision, prelude=r.nan_from_step_5_on, watch={"non_finite": "skip", "most_skips": 3})
    assert set(ended.codes) == {3}, ended.said
    assert "step 7: 3 steps in a row were skipped, watch.most_skips = 3" in ended.said
    assert ended.rows("progress/applied_steps")[7] == 4
    manifest = json.loads((ended.folder.checkpoints / "step_000007" / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["counters"]["skipped_steps"] == 3
