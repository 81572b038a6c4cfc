"""Recorded steps: the traces and the summary of real runs on the engines, and that recording changes no number."""

import contextlib
import errno
import functools
import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models import gpt
from parallel.grid import Grid
from parallel.layers import PlainModule, stage_bounds, unique_parameters
from parallel.slices import slice_of
from research.training import profile_summary
from research.training.profiler import StepProfiler
from research.verification import ledger
from research.verification.layouts import LayoutCase
from tests.research.helpers.example import example
from tests.research.helpers.small_runs import Ended, Stage, bits, stopped_in_step_6

LAYERS = ["embedding", "position", "blocks.0", "blocks.1", "final_norm", "head", "loss"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name: ranks, settings of parallel
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipe": 2}),
    "DP2": (2, {}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "TP2·PP2·SP, full": (4, {"tensor": 2, "pipe": 2, "sequence": True, "recompute": "full"}),
    "PP2·DP2, selective": (4, {"pipe": 2, "recompute": "selective"}),
}
BATCH = {"batch_size": 16, "micro_batch_size": 4}
"""Sequences per step, as many as `LayoutCase` assumes."""
BETWEEN = {"schedule": {"validate_every": 3}}
FAST = ["PP2"]
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in FAST)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, layout: str, name: str, **more: Any) -> Ended:
    world, parallel = LAYOUTS[layout]
    schedule = {"steps": 5, **BATCH, **more.pop("schedule", {})}
    return stage.run(f"{layout} {name}", world, parallel=parallel, schedule=schedule, **more)


def summary(ended: Ended) -> dict[str, Any]:
    return json.loads((ended.folder.profile / "summary.json").read_text())


def trace(ended: Ended, rank: int) -> list[dict[str, Any]]:
    with gzip.open(ended.folder.profile / f"rank_{rank}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.fixture(scope="module")
def recorded(stage: Stage) -> Callable[[str], Ended]:
    """A run on a layout whose steps 3 and 4 are recorded, with a validation and a checkpoint between them."""
    return functools.cache(lambda layout: go(stage, layout, "recorded", profile={"steps": "3-4", "memory": True}, **BETWEEN))


@pytest.mark.parametrize("layout", EVERY)
def test_times_and_collectives_of_recorded_steps(layout: str, stage: Stage, recorded: Callable[[str], Ended]) -> None:
    ended, world = recorded(layout), LAYOUTS[layout][0]
    found = summary(ended)
    assert (ended.codes, found["steps"], len(found["ranks"])) == ([0] * world, [3, 4], world), ended.said
    assert "profile of steps 3–4 · " in ended.said and "USDT" not in ended.said and "CPUAllocator" not in ended.said
    assert_times(found, ended)
    assert_collectives(found, stage, layout)
    for rank in found["ranks"]:
        assert_trace(trace(ended, rank["rank"]), rank)
        assert max(one["bytes"] for one in rank["memory"] if not one["is_layer"]) > 0
    text = (ended.folder.profile / "summary.txt").read_text()
    assert "operations that allocate, a step" in text and "\nblocks.1 " in text and "\nblocks × 2 " not in text
    assert {path.name for path in ended.folder.profile.iterdir()} == {
        *(f"rank_{rank}.json.gz" for rank in range(world)), "summary.json", "summary.txt"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recording_changes_no_number(layout: str, stage: Stage, recorded: Callable[[str], Ended]) -> None:
    ended, plain = recorded(layout), go(stage, layout, "plain", **BETWEEN)
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert ended.hexes(key) == plain.hexes(key) != {}
    assert bits(ended.folder) == bits(plain.folder) != {}
    assert not (plain.folder.path / "profile").exists()


def assert_trace(events: list[dict[str, Any]], rank: dict[str, Any]) -> None:
    """torch's own record has both steps, and counts within them as many messages between stages as the summary says."""
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name", "").startswith("step ")}
    assert set(spans) == {"step 3", "step 4"}
    inside = Counter(
        event["name"] for event in events if event.get("ph") == "X" and any(first <= event["ts"] < last for first, last in spans.values())
    )
    for operation in ("send", "recv"):
        calls = sum(one["calls"] for one in rank["collectives"] if one["operation"] == operation)
        assert inside["c10d::send" if operation == "send" else "c10d::recv_"] == calls
    assert inside["forward loss"] == sum(one["times"] for one in rank["layers"] if (one["layer"], one["direction"]) == ("loss", "forward"))


def assert_times(found: dict[str, Any], ended: Ended) -> None:
    """Every layer has a forward and a backward pass for each of a rank's micro-batches; all labels add up to the steps."""
    seen: set[str] = set()
    ranks = found["ranks"]
    micro_batches = 2 * 4 // len({rank["data"] for rank in ranks})
    for rank in ranks:
        assert sum(one["seconds"] for one in rank["layers"]) == pytest.approx(rank["seconds"])
        times = {(one["layer"], one["part"], one["direction"]): one["times"] for one in rank["layers"]}
        own = {layer for layer, _, _ in times} - {"data", "optimizer", "other"}
        seen |= own
        for layer in own:
            assert times[layer, "", "backward"] == micro_batches, (layer, times)
        assert times["optimizer", "", ""] >= 2
        if rank["pipe"] == 0:
            assert times["embedding", "", "forward"] >= micro_batches and times["blocks.0", "attention", "forward"] == micro_batches
    assert seen == set(LAYERS)
    spent = 1e3 * sum(rank["seconds"] for rank in ranks) / len(ranks) / 2
    assert found["step_ms"] == pytest.approx(spent) and f"{spent:,.1f} ms a step while recorded" in ended.said


def assert_collectives(found: dict[str, Any], stage: Stage, layout: str) -> None:
    """By axis, layer, direction and operation as many calls and elements as the closed forms of models/ and parallel/traffic.py say."""
    world, parallel = LAYOUTS[layout]
    loaded = stage.small("closed forms", {"parallel": parallel, "schedule": BATCH})
    model, settings = loaded.experiment.model, loaded.experiment.parallel
    data = world // settings.tensor // settings.pipe
    case = LayoutCase(settings.pipe, data, settings.tensor, settings.zero_stage, settings.sequence, settings.recompute, 4 // data)
    assert case.micro_batch == 4
    layers = gpt.layers(model, Grid(), 0)
    bounds = stage_bounds(layers, case.pipe)
    for rank in found["ranks"]:
        place = Grid(case.pipe, case.data, case.tensor, rank["rank"])
        here = {layer.name for layer in layers[bounds[place.pipe_rank] : bounds[place.pipe_rank + 1]]}
        here |= {"embedding"} if "head" in here else set()  # the copy of the tied table
        shapes = [
            slice_of(parameter).local_shape(case.tensor)
            for name, parameter in unique_parameters(PlainModule(layers))
            if name.rpartition(".")[0] in here or any(name.startswith(f"{layer}.") for layer in here)
        ]
        expected: Counter[tuple] = Counter()
        for call in ledger.calls(loaded.experiment, case, place, shapes, {}):
            key = (call.axis, call.layer, call.direction, call.operation)
            expected[key, "elements"] += 2 * call.times * call.elements
            expected[key, "calls"] += 2 * call.times if call.axis != "data" else 0
        counted: Counter[tuple] = Counter()
        for one in rank["collectives"]:
            if one["bookkeeping"]:
                continue
            by_layer = (one["layer"], one["direction"]) if one["axis"] == "tensor" else ("", "")
            key = (one["axis"], *by_layer, one["operation"])
            counted[key, "elements"] += one["elements"]
            counted[key, "calls"] += one["calls"] if one["axis"] != "data" else 0
            assert one["bytes"] == 4 * one["elements"] and one["seconds"] > 0
        assert +counted == +expected
    assert bool(+counted) == (world > 1)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_records_by_the_number_of_its_steps(stage: Stage) -> None:
    """Steps 5–8 are asked for; SIGUSR1 comes in step 6. The resumed run records 7 and 8; one that begins after them says so."""
    profile = {"profile": {"steps": "5-8"}, "schedule": {"steps": 10}}
    stopped = go(stage, "PP2", "stopped", prelude=stopped_in_step_6, **profile)
    assert summary(stopped)["steps"] == [5, 6] and "profile of steps 5–6" in stopped.said
    resumed = go(stage, "PP2", "stopped", resume="auto", **profile)
    assert resumed.folder.path == stopped.folder.path and summary(resumed)["steps"] == [7, 8]
    assert {event["name"] for event in trace(resumed, 1)} >= {"step 7", "step 8"}
    later = go(stage, "PP2", "stopped", resume=str(stopped.folder.path), **profile | {"schedule": {"steps": 12}})
    assert "profile.steps = '5-8' are over: the run goes on after step 10 → name later steps, or None" in later.said
    assert later.codes == [0, 0] and summary(later)["steps"] == [7, 8]


def test_a_run_that_records_nothing_is_left_as_it_is() -> None:
    run: Any = SimpleNamespace(job=SimpleNamespace(experiment=example()), step=0)
    profiler, batches = StepProfiler(run), iter([])
    assert isinstance(profiler.step(1), contextlib.nullcontext) and profiler.batches(batches) is batches
    profiler.close()


def rank(pipe: int, layers: list[tuple[str, str, str, float]], calls: int, **more: Any) -> dict[str, Any]:
    keys = ("layer", "part", "direction", "seconds")
    collective = {"axis": "pipe", "operation": "send", "layer": "", "direction": "", "bookkeeping": False}
    return {
        "pipe": pipe,
        "seconds": math.fsum(one[-1] for one in layers),
        "layers": [dict(zip(keys, one, strict=True)) for one in layers],
        "collectives": [{**collective, "calls": calls, "bytes": 4e6 * calls, "seconds": 0.5 * calls}],
        **more,
    }


def test_the_tables_add_up_by_hand() -> None:
    """Two stages of two data ranks each, two steps: blocks of the stages add up, those of the data ranks are averaged."""
    first = [
        ("embedding", "", "forward", 0.2),
        ("blocks.0", "", "forward", 0.1),
        ("blocks.0", "mlp", "backward", 0.5),
        ("other", "", "", 0.2),
    ]
    last = [("blocks.1", "mlp", "forward", 0.4), ("blocks.1", "mlp", "backward", 0.4), ("loss", "", "forward", 0.1), ("data", "", "", 0.1)]
    slower = [(layer, part, direction, 3 * seconds) for layer, part, direction, seconds in last]
    found = profile_summary.Summary([7, 8], [rank(0, first, 2), rank(0, first, 2), rank(1, last, 4), rank(1, slower, 6)], before_ms=123.4)
    times = found.layer_ms()
    assert list(times) == [("embedding", ""), ("blocks × 2", ""), ("blocks × 2", "mlp"), ("loss", ""), ("data", ""), ("other", "")]
    columns, share = times["blocks × 2", ""]
    assert columns == pytest.approx({"forward": 50 + 400, "backward": 250 + 400}) and share == pytest.approx((0.6 + 0.6 + 0.8 + 0.8) / 4)
    assert times["blocks × 2", "mlp"][0] == pytest.approx({"forward": 400, "backward": 650})
    assert times["loss", ""] == (pytest.approx({"forward": 100}), pytest.approx(0.1))
    assert found.layer_ms(every_block=True)["blocks.1", ""][0] == pytest.approx({"forward": 400, "backward": 400})
    assert found.step_ms == pytest.approx(750.0)
    lines = found.lines()
    assert "profile of steps 7–8 · 750.0 ms a step while recorded (123.4 before recording)" in lines
    assert f"{'pipe':<16}{'send':<14}{'1–3':>12}{'4.000–12.000':>16}{'500.00–1,500.00':>18}" in lines
    assert max(map(len, lines)) <= 80


def test_one_step_of_one_rank_has_no_ranges() -> None:
    found = profile_summary.Summary([7], [{**rank(0, [("loss", "", "forward", 0.5)], 0), "collectives": []}])
    assert found.lines()[1] == "profile of step 7 · 500.0 ms a step while recorded" and not any(
        "collectives" in line for line in found.lines()
    )


def disk_of_rank_1_is_full(rank: int) -> None:
    """Rank 1 cannot write its trace."""
    from research.training.profiler import Recording

    def refuse(recording: Recording, folder: Path, rank: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/rank_{rank}.json.gz")

    if rank == 1:
        Recording.write = refuse  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_trace_that_the_disk_of_another_rank_refuses_is_said_and_costs_only_the_trace(stage: Stage) -> None:
    ended = go(stage, "TP2", "refused", profile={"steps": "3-4"}, prelude=disk_of_rank_1_is_full)
    assert ended.codes == [0, 0], ended.said
    assert "the profile of rank 1 could not be written (" in ended.said
    assert "/profile/rank_1.json.gz: No space left on device)" in ended.said
    assert {path.name for path in ended.folder.profile.iterdir()} == {"rank_0.json.gz", "summary.json", "summary.txt"}
    assert len(summary(ended)["ranks"]) == 2
