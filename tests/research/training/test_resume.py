"""A run that goes on is the run that was never stopped: bit for bit on its layout, within rounding on another, or refused in words."""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel.errors import Damaged, Mistake
from parallel.files import read_json, write_json
from research.cluster.exit_codes import DAMAGED
from research.cluster.software import digest_of
from research.config import Experiment, schema, serialization
from research.config.diff import diff
from research.tracking import metrics, run_folder, run_lock, run_status
from research.tracking.run_folder import FAILED, FINISHED, IMPORTED, INTERRUPTED, RUNNING, RunFolder
from research.tracking.run_lock import RunLock, is_held, release
from research.training import resume
from research.training.anomalies import load as incident_of
from research.training.fallback import Start
from research.training.resume import AUTO, find
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers import small_runs as r
from tests.research.helpers.example import example, sentence
from tests.research.helpers.launches import Ended, Place, run
from tests.research.helpers.small_runs import DROPS, Stage, bits
from tests.research.tracking.test_tracker import inspected, logged, of


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
    resume.check_init_from(example(), tmp_path)
    resume.check_init_from(example(init_from=f"{name}/checkpoints/step_000000"), tmp_path)
    resume.check_init_from(example(init_from=str(folder.checkpoints / "step_000000")), Path("/elsewhere"))
    said = sentence(lambda: resume.check_init_from(example(init_from=name), tmp_path))
    assert said.endswith(f"→ name {name}/checkpoints/step_000000") and f"init_from = '{name}'" in said
    assert sentence(lambda: resume.check_init_from(example(init_from="nothing"), tmp_path)).endswith(
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
        return list(resume.doubts_of_init_from(example(data=schema.Data(**texts | now), init_from=name), tmp_path))

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
    assert list(resume.doubts_of_init_from(example(init_from="runs/old/aaaaaa/checkpoints/step_000006"), tmp_path)) == []


def test_ranks_compare_the_weights_they_begin_with(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", offset=1.0)
    digests = [resume.init_from_digest(example(init_from=where), tmp_path) for where in ("a", "b", "c")]
    assert len(set(digests)) == 3 and digests[2] == "missing" and resume.init_from_digest(example(), tmp_path) == "drawn"


def test_what_was_imported_is_begun_with_not_resumed(tmp_path: Path) -> None:
    folder = imported(tmp_path / "runs", example())
    assert find(AUTO, example(), Path("mine"), tmp_path / "runs") == (None, "a new run: mine has no unfinished run with a checkpoint")
    said = sentence(lambda: find(str(folder.path), example(), Path("mine"), tmp_path / "runs"))
    assert said.startswith(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out")


# Which run `--resume auto` takes.


def made(runs: Path, status: str = INTERRUPTED, **settings) -> RunFolder:
    """A run of `mine` with a checkpoint after step 1 that has ended like this."""
    folder = run_folder.create(runs, "mine")
    experiment = example(**settings)
    serialization.save(experiment, folder.config)
    save(folder.checkpoints / "step_000001")
    run_folder.start(folder, layout="", precision="fp32", steps=2)
    if status != RUNNING:
        run_folder.end(folder, status)
    return folder


def auto(runs: Path, **settings) -> tuple[RunFolder | None, str]:
    locks = list[RunLock]()
    found, why = find(AUTO, example(**settings), Path("mine"), runs, locks)
    assert len(locks) == 1
    locks.pop().release()
    return (found.folder if found else None), why


def test_an_unfinished_run_is_found_behind_a_finished_one_with_another_seed(tmp_path: Path) -> None:
    first, second = made(tmp_path, seed=1), made(tmp_path, FINISHED, seed=2)
    assert auto(tmp_path, seed=1) == (first, "")
    assert auto(tmp_path, seed=2) == (None, f"a new run: {second.title}, which has these settings, is finished")


def test_what_is_no_science_may_differ(tmp_path: Path) -> None:
    """Another length, layout and place of the cache; the newest of two that match is taken, and said."""
    older, newer = made(tmp_path, schedule={"steps": 600}), made(tmp_path, FAILED, parallel={"tensor": 2})
    made(tmp_path, seed=7)
    run_folder.create(tmp_path, "mine")  # begun, and killed at once
    assert auto(tmp_path) == (newer, f"{newer.title} is the newest unfinished run with these settings; older: {older.title}")


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"optimizer": {"lr": 1.0}}, "optimizer.lr 0.003 → 1.0"),
        ({"init_from": "b"}, "init_from None → b"),
        ({"optimizer": {"lr": 1.0}, "seed": 3}, "optimizer.lr 0.003 → 1.0, seed 1 → 3"),
    ],
)
def test_a_new_run_begins_where_none_matches_and_the_nearest_is_named(tmp_path: Path, settings: dict, differs: str) -> None:
    nearest = made(tmp_path)
    made(tmp_path, model={"num_layers": 6}, optimizer={"eps": 1e-7}, seed=9)
    none, why = auto(tmp_path, **settings)
    assert none is None
    assert why == f"a new run: no unfinished run has these settings; {nearest.title} is nearest, with {differs}"


def test_another_variant_is_another_experiment(tmp_path: Path) -> None:
    mine, source = {"model": {"norm": "variant:Mine"}}, tmp_path / "experiments" / "mine"
    source.mkdir(parents=True)
    (source / "config.py").write_text("")
    (source / "variant.py").write_text("class Mine: ...")
    folder = made(tmp_path, **mine)
    run_folder.keep_source(folder, source)
    found, _ = find(AUTO, example(**mine), source, tmp_path)
    assert found is not None and found.folder == folder
    (source / "variant.py").write_text("class Mine: pass")
    found, why = find(AUTO, example(**mine), source, tmp_path)
    assert found is None and f"{folder.title} is nearest, with variant.py " in why


def test_a_run_that_cannot_be_read_keeps_no_other_from_being_found(tmp_path: Path) -> None:
    damaged, other = made(tmp_path), made(tmp_path, seed=5)
    damaged.config.write_text("{")
    assert auto(tmp_path, seed=5) == (other, "")
    assert auto(tmp_path)[1].endswith(f"; {damaged.title} cannot be read")


# A run that is running, or says so.


def beats(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Its ranks write heartbeats meanwhile, on whatever machine."""

    @contextlib.contextmanager
    def beating() -> Iterator[None]:
        over = threading.Event()

        def write() -> None:
            beat = 0
            while not over.wait(0.02):
                beat += 1
                folder.heartbeat(1).write_text(f'{{"beat": {beat}}}')

        thread = threading.Thread(target=write)
        thread.start()
        yield
        over.set()
        thread.join()

    return beating()


def test_a_run_that_is_running_is_refused_with_its_process_and_since_when(tmp_path: Path) -> None:
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run)
    said = f"{folder.title} is running (process {os.getpid()} on {run['host']}, since {run['started']}) → wait for its end, or end it: "
    for handle in (AUTO, folder.title):
        assert sentence(lambda: find(handle, example(), Path("mine"), tmp_path)) == f"{said}kill -USR1 {os.getpid()}"  # noqa: B023


def test_a_strangers_process_with_the_number_is_not_the_run(tmp_path: Path) -> None:
    """The run was killed, and its number is now this process's."""
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run)
    write_json(folder.run, run | {"started_after_boot": run["started_after_boot"] - 100})
    assert auto(tmp_path) == (folder, "")


ELSEWHERE = [{"boot_id": "another", "host": "node7"}, {"pid_namespace": "pid:[1]", "host": "node7"}, {"boot_id": None, "host": "node7"}]
"""On another machine, in another container, and in a run.json of an older version, which had host and pid only."""


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_a_process_out_of_sight_is_known_by_its_heartbeat(
    tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed as process 1 of its container, it can be resumed; while it lives, it is refused, whatever process 1 is here."""
    monkeypatch.setattr(run_lock, "LISTEN_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run) | elsewhere | {"pid": 1}
    write_json(folder.run, {key: value for key, value in run.items() if value is not None})
    folder.heartbeat(0).write_text("{}")
    who = f"process 1 on node7, since {run['started']}"
    with beats(folder):
        said = sentence(lambda: find(AUTO, example(), Path("mine"), tmp_path, []))
    end = "it cannot be seen from here, but its heartbeat goes on → wait for its end, or end it there: kill -USR1 1"
    assert said == f"{folder.title} is running ({who}): {end}"
    capsys.readouterr()
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.folder == folder and not folder.lock.exists()
    assert capsys.readouterr().err.endswith(": a dry run does not watch its heartbeat\n")
    assert auto(tmp_path) == (folder, "")
    assert capsys.readouterr() == ("", f"resume   {folder.title} may be in use by {who}: its heartbeat is watched for 0 s …\n")


# The locks that `find` takes.


def test_a_run_is_locked_from_finding_it_on(tmp_path: Path) -> None:
    folder, locks = made(tmp_path), list[RunLock]()
    find(AUTO, example(), Path("mine"), tmp_path, locks)
    assert [lock.place for lock in locks] == [folder.lock] and is_held(folder.lock)
    who = f"process {os.getpid()} on {read_json(folder.run)['host']}, since "
    for handle in (AUTO, folder.title, str(folder.checkpoints / "step_000001")):
        assert f"{folder.title} is running ({who}" in sentence(lambda: find(handle, example(), Path("mine"), tmp_path, []))  # noqa: B023
    release(locks)
    assert auto(tmp_path) == (folder, "")
    assert not [path for path in (tmp_path / "mine").iterdir() if path.name.startswith(".starting")]


def test_a_run_that_is_refused_is_not_locked(tmp_path: Path) -> None:
    folder, locks = made(tmp_path, FINISHED, schedule={"steps": 1}), list[RunLock]()
    with pytest.raises(Mistake, match="has taken all of its"):
        find(folder.title, example(schedule={"steps": 1}), Path("mine"), tmp_path, locks)
    assert not is_held(folder.lock)


def test_no_new_run_begins_beside_a_running_one_with_these_settings(tmp_path: Path) -> None:
    """It has no checkpoint yet. With another seed it is another run; once it has died, a new one begins."""
    made(tmp_path, seed=7)
    folder = made(tmp_path, RUNNING)
    shutil.rmtree(folder.checkpoints)
    lock = run_status.take_lock(folder)
    assert f"{folder.title} is running (process {os.getpid()} on " in sentence(lambda: find(AUTO, example(), Path("mine"), tmp_path, []))
    assert auto(tmp_path, seed=3)[0] is None
    lock.release()
    assert auto(tmp_path)[0] is None


def test_of_two_that_begin_the_same_run_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both find nothing to resume. Another seed is another run; what may change on a resume is the same one."""
    locks = list[RunLock]()
    assert find(AUTO, example(), Path("mine"), tmp_path, locks)[0] is None and len(locks) == 1
    said = sentence(lambda: find(AUTO, example(schedule={"steps": 7}), Path("mine"), tmp_path, []))
    assert said.startswith("a run of mine with these settings is in use by `--resume auto` (process ") and str(os.getpid()) in said
    others = list[RunLock]()
    find(AUTO, example(seed=3), Path("mine"), tmp_path, others)
    release(others)
    release(locks)
    find(AUTO, example(), Path("mine"), tmp_path, locks)
    locks.pop().release()


def test_a_run_that_its_holder_has_finished_meanwhile_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was unfinished when it was found, and finished when its lock was free."""
    folder = made(tmp_path)
    take_lock = run_status.take_lock

    def after_its_end(*arguments: object, **more: object) -> RunLock:
        run_folder.end(folder, FINISHED)
        return take_lock(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(run_status, "take_lock", after_its_end)
    locks = list[RunLock]()
    found, why = find(AUTO, example(), Path("mine"), tmp_path, locks)
    assert found is None and why == f"a new run: {folder.title}, which has these settings, is finished"
    assert [lock.place.name[:10] for lock in locks] == [".starting-"]
    release(locks)


# Damaged checkpoints.


def damage(checkpoint: Path, how: str) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "empty manifest":
        (checkpoint / "manifest.json").write_text("")
    else:
        text = (checkpoint / "manifest.json").read_text()
        (checkpoint / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("how", ["truncated", "missing", "empty manifest", "flipped manifest"])
def test_auto_falls_back_to_the_newest_whole_checkpoint_and_a_path_does_not(tmp_path: Path, how: str) -> None:
    folder = made(tmp_path)
    newest = folder.checkpoints / "step_000002"
    save(newest, step=2)
    damage(newest, how)
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.checkpoint == folder.checkpoints / "step_000001" and found.step == 1
    assert list(found.passed_over) == ["step_000002"] and str(newest) in found.passed_over["step_000002"]
    for handle in (folder.title, str(newest)):
        with pytest.raises(Damaged, match="step_000001, the newest whole one, or --resume auto") as refused:
            find(handle, example(), Path("mine"), tmp_path)
        assert str(newest) in str(refused.value) and refused.value.code == DAMAGED
    damage(folder.checkpoints / "step_000001", how)
    if how != "flipped manifest":
        with pytest.raises(Damaged, match=f"{folder.title} has no whole checkpoint: .*step_000002.*; .*step_000001"):
            find(AUTO, example(), Path("mine"), tmp_path)


def test_a_checkpoint_after_the_latest_is_of_another_future(tmp_path: Path) -> None:
    """The run was resumed from step 1 on purpose, and has saved step 3 since; step 9 was before that."""
    folder = made(tmp_path)
    for step in (9, 3):
        save(folder.checkpoints / f"step_{step:06d}", step=step)
    damage(folder.checkpoints / "step_000003", "missing")
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.step == 1


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


# What the header says of a resumed run.

EXACT = "bit for bit as if it had never stopped"
SAME_CODE = {
    True: "",
    False: ", if the code, which has changed, still computes the same",
    None: ", if the code is the one that saved it, which this checkpoint does not say",
}
WSD = {"decay": "wsd", "decay_steps": 50}
AT_120 = [  # settings then, settings now, differences of layout and machine, what is said at step 120
    ({}, {}, {}, EXACT),
    ({}, {"checkpoints": {"every": 7}, "track": {"group": "x"}, "data": {"cache": "elsewhere"}}, {}, EXACT),
    ({}, {"parallel": {"recompute": "full"}}, {}, EXACT),
    (
        {},
        {},
        {"layout.tensor": (1, 2), "machine.threads": (4, 2)},
        "within rounding (tensor 1 → 2, threads 4 → 2) as if it had never stopped",
    ),
    ({}, {"deepspeed": {"x": 1}}, {}, "within rounding (other DeepSpeed settings) as if it had never stopped"),
    ({}, {"schedule": {"steps": 600}}, {}, "same state, other learning rates from here on (cosine over 600 steps, not 300)"),
    (
        {"optimizer": {"decay": "linear"}},
        {"optimizer": {"decay": "linear"}, "schedule": {"steps": 200}},
        {"layout.precision": ("fp32", "bf16")},
        "same state, other learning rates from here on (linear over 200 steps, not 300), within rounding (precision fp32 → bf16)",
    ),
    ({"optimizer": WSD}, {"optimizer": WSD, "schedule": {"steps": 600}}, {}, "bit for bit as if it had been begun with 600 steps"),
    (
        {"optimizer": WSD, "schedule": {"steps": 150}},
        {"optimizer": WSD},
        {},
        "same state, other learning rates from here on (wsd over 300 steps, not 150)",
    ),
    ({"optimizer": {"decay": "constant"}}, {"optimizer": {"decay": "constant"}, "schedule": {"steps": 600}}, {}, EXACT),
    ({"optimizer": {"decay": "inverse_sqrt"}}, {"optimizer": {"decay": "inverse_sqrt"}, "schedule": {"steps": 600}}, {}, EXACT),
    (
        {},
        {"schedule": {"validate_every": 5, "log_every": 7}, "sample": {"every": 3}, "watch": {"spike": 6.0}},
        {},
        f"{EXACT}, with other validations, rows of metrics.jsonl, samples and checks of each step",
    ),
]


def settled(changes: dict) -> Experiment:
    """The example with changes by group, of groups that have defaults too."""
    groups = {"checkpoints": schema.Checkpoints, "track": schema.Track, "sample": schema.Sample, "watch": schema.Watch}
    settings = {name: groups[name](**values) if name in groups else values for name, values in changes.items()}
    if "data" in settings:
        settings["data"] = schema.Data(**{**example().data.model_dump(), **settings["data"]})
    return example(**settings)


@pytest.mark.parametrize(("then", "now", "differences", "said"), AT_120)
def test_bit_for_bit_is_said_only_where_nothing_that_matters_has_changed(then: dict, now: dict, differences: dict, said: str) -> None:
    changes = diff(settled(then), settled(now))
    assert resume.science(changes) == []
    for same_code, condition in SAME_CODE.items():
        assert resume.continuation(120, changes, settled(now), differences, same_code, "cpu") == f"{said}{condition}"
    assert "bit for bit" not in resume.continuation(120, changes, settled(now), differences, True, "cuda")
    deterministic = settled(now | {"deterministic": True})  # on a GPU, then and now: what is said of a CPU holds
    assert resume.continuation(120, changes, deterministic, differences, True, "cuda") == f"{said}{SAME_CODE[True]}"


def test_kernels_that_are_deterministic_only_now_make_no_bit_for_bit() -> None:
    now = settled({"deterministic": True})
    said = resume.continuation(120, [], now, {"machine.deterministic": (False, True)}, True, "cuda")
    assert said == "within rounding (deterministic False → True) as if it had never stopped"
    said = resume.continuation(120, [], settled({}), {"machine.deterministic": (True, False)}, True, "cuda")
    assert said == "within rounding (deterministic True → False, GPU kernels) as if it had never stopped"


CODE = {"models/mlp.py": "1"}


@pytest.mark.parametrize(("facts", "same_code"), [({"code": digest_of(CODE)}, True), ({"code": "b"}, False), ({}, None)])
def test_a_checkpoint_that_does_not_say_its_code_is_not_said_to_be_of_another(
    facts: dict, same_code: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints had no such fact once, and nothing speaks for a change of the code since then."""
    from research.training import setup

    monkeypatch.setattr(setup.process_state, "differences", lambda facts, engine: {})
    resumed = Start(RunFolder(tmp_path / "mine" / "aaaaaa"), tmp_path / "step_000120", 120, [])
    job, engine = SimpleNamespace(library=CODE, experiment=example()), SimpleNamespace(device=SimpleNamespace(type="cpu"))
    line = setup.resume_line(resumed, {"step": 120, **facts}, job, engine, {})  # type: ignore[arg-type]
    assert line == f"step 120 of mine-aaaaaa, step_000120 · {EXACT}{SAME_CODE[same_code]}"


def test_every_setting_that_may_change_is_known_to_change_steps_or_not() -> None:
    """A new group in MAY_CHANGE must be put in one of these lists, or the header would promise too much."""
    nothing = {"schema", "question", "parent", "data.cache", "checkpoints", "track", "profile"}
    # parallel/engines/process_state.py compares these
    by_arithmetic = {"schedule.micro_batch_size", "parallel", "precision", "deterministic"}
    assert nothing | by_arithmetic | {"schedule.steps", "deepspeed"} | resume.RECORDED.keys() == set(resume.MAY_CHANGE)


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


# What is not finite.

SKIPPING = [("1", "fp32"), ("DP2", "bf16"), ("ZeRO-3", "fp32"), ("ZeRO-2", "bf16"), ("ZeRO-3", "bf16"), ("PP2", "fp32")]


@pytest.mark.parametrize(("layout", "precision"), [("DP2", "fp32"), pytest.param("TP2", "bf16", marks=pytest.mark.slow)])
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
