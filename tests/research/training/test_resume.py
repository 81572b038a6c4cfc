"""A run that goes on is the run that was never stopped: bit for bit on its layout, within rounding on another, or refused in words."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel.errors import Mistake
from parallel.files import read_json, write_json
from research.cluster.exit_codes import DAMAGED
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder
from research.training import resume
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers import small_runs as r
from tests.research.helpers.launches import Ended
from tests.research.helpers.small_runs import DROPS, Stage, bits
from tests.research.tracking.test_tracker import inspected, logged, of
from tests.research.training.test_resume_line import EXACT

SCIENCE = {"model": DROPS, "optimizer": {"clip": 0.5, "warmup_steps": 4}}
"""Dropout everywhere, a clip that binds, a warm-up; batches of 8 in micro-batches of 2 are accumulated."""
LAYOUTS = {  # name: ranks, settings of parallel
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipe": 2}),
    "DP2": (2, {}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "TP2·PP2": (4, {"tensor": 2, "pipe": 2}),
    "TP2·SP": (2, {"tensor": 2, "sequence": True}),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, name: str, layout: str, precision: str = "fp32", **more) -> Ended:
    world, parallel = LAYOUTS[layout]
    return stage.run(name, world, **{**SCIENCE, "parallel": parallel, "precision": precision, **more})


FAST = [("PP2", "fp32")]
EXACT_SLOW = [(layout, precision) for layout in LAYOUTS for precision in ("fp32", "bf16") if (layout, precision) not in FAST]


@pytest.mark.parametrize(("layout", "precision"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EXACT_SLOW)])
def test_stopped_and_resumed_is_never_stopped(stage: Stage, layout: str, precision: str) -> None:
    """Losses, norms and validations as hexadecimal floats, and every bit of the last checkpoint's weights and moments."""
    name = f"exact_{layout}_{precision}"
    whole = go(stage, f"{name}_whole", layout, precision)
    assert set(whole.codes) == {0}, whole.said
    stopped = go(stage, name, layout, precision, prelude=r.stopped_in_step_6)
    assert set(stopped.codes) == {138} and max(stopped.rows()) == 6
    resumed = go(stage, name, layout, precision, resume="auto")
    assert set(resumed.codes) == {0}, resumed.said
    assert resumed.folder == stopped.folder
    assert "step 6 of" in resumed.said and EXACT in resumed.said
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert resumed.hexes(key) == whole.hexes(key)
    assert bits(resumed.folder) == bits(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "exact"),
    [("constant", EXACT), ("wsd", "bit for bit as if it had been begun with 20 steps"), ("cosine", "other learning rates")],
)
def test_a_longer_run_is_what_the_header_says(stage: Stage, decay: str, exact: str) -> None:
    """12 steps, stopped after 6, go on to 20: compared with 20 steps from the beginning, as hexadecimal floats."""
    optimizer = {"clip": 0.5, "warmup_steps": 4, "decay": decay, "decay_steps": 3 if decay == "wsd" else None}
    longer = {"optimizer": optimizer, "schedule": {"steps": 20}}
    begun = go(stage, f"begun_{decay}", "1", **longer)
    go(stage, f"longer_{decay}", "1", prelude=r.stopped_in_step_6, optimizer=optimizer)
    resumed = go(stage, f"longer_{decay}", "1", resume="auto", **longer)
    assert set(resumed.codes) == {0} and exact in resumed.said
    assert (resumed.hexes() == begun.hexes()) == ("bit for bit" in exact)


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Ended:
    """One rank, never disturbed."""
    return go(stage, "whole", "1")


def test_after_a_kill_the_record_is_one_and_nothing_of_it_is_lost(stage: Stage, whole: Ended) -> None:
    killed = go(stage, "killed", "1", prelude=r.killed_in_step_8)
    assert killed.codes == [-9] and max(killed.rows()) == 7
    resumed = go(stage, "killed", "1", resume="auto")
    rows = [row["progress/step"] for row in metrics.read(resumed.folder.metrics) if "train/loss" in row]
    assert rows == list(range(1, 13)) and resumed.hexes() == whole.hexes()
    dropped = list(metrics.read(resumed.folder.path / "dropped.jsonl"))
    assert [(row["segment"], row["file"], row["progress/step"]) for row in dropped] == [(2, "metrics.jsonl", 7)]
    run = read_json(resumed.folder.run)
    assert run["status"] == "finished" and [segment["from_step"] for segment in run["segments"]] == [0, 6]
    assert resumed.rows("progress/seconds")[12] > resumed.rows("progress/seconds")[6]
    assert sorted(path.name for path in resumed.folder.checkpoints.glob("step_*")) == ["step_000009", "step_000012"]  # keep_last = 2


ACROSS = [pytest.param("TP2", "PP2", marks=pytest.mark.slow), pytest.param("ZeRO-3", "TP2·SP", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("first", "second"), ACROSS)
def test_another_layout_goes_on_within_rounding(stage: Stage, whole: Ended, first: str, second: str) -> None:
    name = f"{first}_to_{second}"
    go(stage, name, first, prelude=r.stopped_in_step_6)
    resumed = go(stage, name, second, resume="auto")
    assert set(resumed.codes) == {0}, resumed.said
    assert "within rounding" in resumed.said and "parallel." in resumed.said
    for step, loss in whole.rows().items():
        assert abs(resumed.rows()[step] - loss) <= 2e-5 * loss


def test_a_background_save_is_the_same_checkpoint(stage: Stage, whole: Ended) -> None:
    older = run_folder.create(stage.place / "behind", "gpt_sotu")
    run_folder.start(older, layout="", precision="", steps=1)
    save(older.checkpoints / "step_000001")
    behind = go(stage, "behind", "1", checkpoints={"background": True})
    assert (older.path.parent / "latest").resolve() == behind.folder.path  # since its first checkpoint
    assert behind.codes == [0] and behind.hexes() == whole.hexes() and bits(behind.folder) == bits(whole.folder)


@pytest.mark.slow
def test_wandb_gets_a_second_offline_segment_with_the_same_id(stage: Stage) -> None:
    """Read back by W&B's own reader: each segment has its own rows, the second says where it began."""
    track = {"mode": "offline", "tags": ("mine", "fp32"), "job_type": "ablation"}
    go(stage, "tracked", "1", prelude=r.stopped_in_step_6, track=track)
    resumed = go(stage, "tracked", "1", resume="auto", track=track)
    first, second = sorted(resumed.folder.wandb.glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in (first, second)} == {resumed.folder.id}
    rows = {path: logged(SimpleNamespace(wandb=path)) for path in (first, second)}
    for path in (first, second):
        (about,) = of(inspected(SimpleNamespace(wandb=path)), "run")
        assert (about["tags"], about["job_type"]) == (["pipe 1 × data 1 × tensor 1", "ZeRO-1", "fp32", "mine"], "ablation")
    steps = [{row["progress/step"] for row in rows[path] if "train/loss" in row} for path in (first, second)]
    assert steps == [set(range(1, 7)), set(range(7, 13))]
    assert any(row.get("progress/resumed_at") == 6 for row in rows[second])


# What is refused.


@pytest.fixture(scope="module")
def kept(stage: Stage) -> RunFolder:
    """A run that was stopped after six steps."""
    return go(stage, "kept", "1", prelude=r.stopped_in_step_6).folder


def refused(stage: Stage, name: str = "kept", asked: str = "gpt_sotu", source: str = "gpt_sotu", **changes) -> str:
    loaded = stage.small(name, {**SCIENCE, **changes})
    with pytest.raises(Mistake) as caught:
        resume.find(asked, loaded.experiment, loaded.folder.with_name(source), Path(loaded.experiment.track.runs))
    assert "→" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": DROPS | {"num_layers": 3}}, "model.num_layers 2 → 3"),
        ({"model": DROPS | {"mlp_dropout": 0.2}}, "model.mlp_dropout 0.1 → 0.2"),
        ({"optimizer": {"lr": 1.0, "clip": 0.5}}, "optimizer.lr 0.003 → 1.0"),
        ({"schedule": {"batch_size": 16}}, "schedule.batch_size 8 → 16"),
        ({"seed": 2}, "seed 1 → 2"),
    ],
)
def test_other_science_is_refused_with_the_difference(stage: Stage, kept: RunFolder, changes: dict, named: str) -> None:
    assert named in refused(stage, **changes)


def test_other_plumbing_is_allowed_and_listed(stage: Stage, kept: RunFolder) -> None:
    loaded = stage.small("kept", {**SCIENCE, "schedule": {"steps": 20, "log_every": 5}, "parallel": {"tensor": 2}, "precision": "bf16"})
    found, _ = resume.find("auto", loaded.experiment, loaded.folder, Path(loaded.experiment.track.runs))
    assert found is not None and found.step == 6
    assert {name: now for name, _, now in found.changed} == {
        "schedule.steps": 20, "schedule.log_every": 5, "parallel.tensor": 2, "precision": "bf16",
    }  # fmt: skip


def test_a_checkpoint_a_run_or_never(stage: Stage, kept: RunFolder) -> None:
    loaded = stage.small("kept", SCIENCE)
    runs = Path(loaded.experiment.track.runs)
    assert resume.find("never", loaded.experiment, loaded.folder, runs) == (None, "")
    by_name, said = resume.find("gpt_sotu", loaded.experiment, loaded.folder, runs)
    assert by_name is not None and by_name.step == 6 and said == f"gpt_sotu is {kept.title}, the newest run with a checkpoint"
    by_run, _ = resume.find(str(kept.path), loaded.experiment, loaded.folder, runs)
    by_checkpoint, _ = resume.find(str(kept.checkpoints / "step_000003"), loaded.experiment, loaded.folder, runs)
    assert by_run is not None and by_checkpoint is not None and (by_run.step, by_checkpoint.step) == (6, 3)
    assert "there is no run folder" in refused(stage, asked="nothing_here")
    assert "is a run of gpt_sotu, this is llama_sotu" in refused(stage, asked=str(kept.path), source="llama_sotu")


def copied(kept: RunFolder, tmp_path: Path, **run) -> RunFolder:
    folder = RunFolder(tmp_path / "gpt_sotu" / "aaaaaa")
    shutil.copytree(kept.path, folder.path)
    write_json(folder.run, {**read_json(folder.run), **run})
    return folder


@pytest.mark.parametrize("pointer", ["", "step_999999", "../../elsewhere", "\0garbage\xff"])
def test_a_latest_that_leads_nowhere_is_named_with_the_way_out(stage: Stage, kept: RunFolder, tmp_path: Path, pointer: str) -> None:
    folder = copied(kept, tmp_path)
    (folder.checkpoints / "latest").write_text(pointer)
    said = refused(stage, asked=str(folder.path))
    assert "latest names" in said and "step_000006" in said


def test_a_run_that_is_finished_is_refused(stage: Stage, kept: RunFolder, tmp_path: Path) -> None:
    folder = copied(kept, tmp_path, status="finished")
    assert "has taken all of its 6 steps → add --schedule.steps 12" in refused(stage, asked=str(folder.path), schedule={"steps": 6})


def test_other_data_under_the_same_name_is_refused_before_a_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run("runs", prelude=r.stopped_in_step_6)
    text = tmp_path / "validation.txt"
    text.write_text(text.read_text()[:-100])
    ended = stage.run("runs", resume="auto")
    assert ended.codes == [2] and "the data is not what" in ended.said and max(ended.rows()) == 6


def test_a_damaged_file_is_named_before_a_step(stage: Stage, kept: RunFolder, whole: Ended) -> None:
    """A flipped bit is found by its hash, while the checkpoint is loaded. A path is refused, auto takes the one before."""
    place = stage.place / "damaged"
    shutil.copytree(stage.place / "kept", place)
    folder = RunFolder(place / "gpt_sotu" / kept.id)
    file = sorted((folder.checkpoints / "step_000006").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ended = go(stage, "damaged", "1", resume=str(folder.path))
    assert ended.codes == [DAMAGED] and file.name in ended.said and max(ended.rows()) == 6
    assert (read_json(folder.run)["status"], read_json(folder.run)["code"]) == ("failed", DAMAGED)

    ended = go(stage, "damaged", "1", resume="auto")
    assert ended.codes == [0], ended.said
    assert (
        f"{file.name} is damaged: SHA-256 " in ended.said
        and "→ it is set aside, and the run goes on from step_000003 instead" in ended.said
    )
    assert f"resume   step 3 of {folder.title}, step_000003 · {EXACT}" in ended.said
    assert ended.hexes() == whole.hexes()
    segment = read_json(folder.run)["segments"][-1]
    assert (segment["from_step"], segment["checkpoint"]) == (3, "step_000003") and file.name in segment["passed_over"]["step_000006"]
    names = sorted(path.name for path in folder.checkpoints.glob("step_*"))
    assert names == ["step_000006.damaged", "step_000009", "step_000012"]
