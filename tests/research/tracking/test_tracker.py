"""Tracking with the real W&B client: complete offline, a mirror online, and never a crash or a wait whatever the server does.

Every run is a process of its own with an environment of its own; the times are kill timeouts, three times what is promised.
"""

import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parallel.files import write_json
from research import ROOT
from research.tracking import metrics, run_folder, wandb_client, wandb_mirror
from research.tracking.tracker import Tracker
from research.tracking.wandb_client import RunDescription
from research.tracking.wandb_record import TEXTS
from tests.research.helpers import wandb_servers as servers
from tests.research.tracking.test_wandb_artifacts import checkpoint

BOUND = 30  # seconds; promised: 10
KEY = "0123456789" * 4
CONFIG = {
    "schema": 1,
    "question": "does it?",
    "model": {"num_layers": 4, "norm": "layernorm"},
    "optimizer": {"betas": [0.9, 0.95]},
    "track": {"project": "tessera", "mode": "auto", "group": None, "tags": ["mine"], "job_type": "ablation"},
}
DEEPSPEED = {"train_batch_size": 16, "zero_optimization": {"stage": 1}}
ROWS = [
    {"train/loss": 7.5, "train/lr": 1e-3, "perf/tokens_per_second": 3410.5, "progress/step": 10, "progress/tokens": 20480},
    {"train/loss": math.nan, "train/grad_norm": math.inf, "progress/step": 20, "progress/tokens": 40960},
    {"val/loss": 6.5, "val/bits_per_byte": 2.17, "progress/step": 20, "progress/tokens": 40960},
]
SAMPLES = [
    {"progress/step": 20, "progress/tokens": 40960, "prompt": prompt, "text": text, "finish": finish}
    for prompt, text, finish in (
        ("peace", "and\nwar", "end_of_text"),
        ("war", "and peace", "length"),
        ("My fellow citizens", "of the United States", "length"),
    )
]
"""Of two prompts, and then one more."""
LATER = {"train/loss": 5.5, "progress/step": 20, "progress/tokens": 40960}


DESCRIPTION = RunDescription(
    CONFIG,
    DEEPSPEED,
    commit="1a2b3c4",
    dirty=True,
    project="tessera",
    group="gpt_sotu",
    tags=["tensor 2", "fp32", "mine"],
    job_type="ablation",
)


def run(mode="auto", rows=1, kill=0, again=True):
    """What a run's process does; prints one JSON object. `kill`: the signal that ends W&B's processes, SIGTERM at the very end;
    `again` False: none can be started after that."""
    folder = run_folder.create(Path("runs"), "gpt_sotu")
    run_folder.start(folder, layout="tensor 2", precision="fp32", steps=20)
    write_json(folder.config, CONFIG)
    wandb_mirror.HEADER_SECONDS = BOUND  # whatever else this machine is doing
    began = time.monotonic()
    tracker = Tracker(folder, DESCRIPTION, mode)
    started = time.monotonic()
    for _ in range(int(rows)):
        for row in ROWS:
            tracker.log(row)
    if kill == signal.SIGKILL:  # found at the next row
        _end_children(kill, again)
        tracker.log(LATER)
    tracker.samples(SAMPLES[:2])
    tracker.samples(SAMPLES[2:])
    checkpoint(folder, 20)
    for _ in range(2):
        tracker.refer_to_checkpoints(every=10)
    tracker.alert("failed", "after step 20 of 20: the loss is nan", "ERROR")
    if kill == signal.SIGTERM:  # found only when it is asked to finish
        _end_children(kill, again)
    ended = time.monotonic()
    tracker.finish()
    told = {"line": tracker.line, "notes": tracker.notes, "start": started - began, "finish": time.monotonic() - ended}
    print(json.dumps(told | {"folder": str(folder.path), "log": ended - started}))


def _end_children(number, again):
    """End W&B's own processes, this run's only descendants: SIGKILL as a kernel short of memory, SIGTERM as a launcher that stops."""
    children = psutil.Process().children(recursive=True)
    assert children
    for child in children:
        child.send_signal(number)
    psutil.wait_procs(children, BOUND)
    wandb_client._start = wandb_client._start if again else refuse


def refuse(*arguments):
    raise OSError("no more processes")


def launch(tmp_path, *, server=None, **arguments):
    """`run` in a process with an empty home; a server means a made-up key, too. Returns what it printed and what it wrote to stderr."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)} | arguments.pop("environment", {})
    if server:
        environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server}
    code = f"from tests.research.tracking.test_tracker import run; run(**{arguments!r})"
    process = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=4 * BOUND)
    finished = subprocess.run([sys.executable, "-c", code], **process)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    assert told["start"] < BOUND and told["finish"] < BOUND and told["log"] < BOUND
    told["folder"] = run_folder.RunFolder(tmp_path / told["folder"])
    return told, finished.stderr


def inspected(folder):
    """The records of the offline run, as W&B's own reader prints them."""
    written = [(path, path.stat().st_mtime_ns) for path in folder.wandb.rglob("*.wandb")]
    return _inspected(folder.wandb, tuple(sorted(written)))


@functools.cache
def _inspected(wandb, written):
    """`written`: what is in the folder, so that another run of the reader follows another record."""
    reader = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", wandb]
    text = subprocess.run(reader, capture_output=True, text=True, check=True, timeout=BOUND).stdout
    return [json.loads(line) for line in text.splitlines()]


def of(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def logged(folder):
    return [{key: value for key, value in row["item"].items() if not key.startswith("_")} for row in of(inspected(folder), "history")]


def is_whole_offline_run(told):
    """One offline run, every row of metrics.jsonl in it."""
    assert len(list(told["folder"].wandb.glob("offline-run-*"))) == 1
    assert len(list(metrics.read(told["folder"].metrics))) == len(ROWS)
    assert len(untabled(told["folder"])) == len(ROWS) + len(SAMPLES)
    return True


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run without a key."""
    return launch(tmp_path_factory.mktemp("offline"))


def test_metrics_jsonl_is_the_source_of_truth(offline):
    folder = offline[0]["folder"]
    assert repr(list(metrics.read(folder.metrics))) == repr(ROWS)
    assert list(metrics.read(folder.samples)) == SAMPLES


def test_the_offline_run_has_every_row(offline):
    spoken = [{key: {"nan": "NaN", "inf": "Infinity"}.get(str(value), value) for key, value in row.items()} for row in ROWS]
    samples = [{f"sample/{key}" if key in TEXTS else key: value for key, value in row.items()} for row in SAMPLES]
    assert untabled(offline[0]["folder"]) == [*spoken, *samples]


def untabled(folder):
    """The rows that are not the table of samples."""
    return [row for row in logged(folder) if "samples.path" not in row]


def tables(folder):
    """W&B's tables of samples, oldest first, as its files hold them."""
    (offline,) = folder.wandb.glob("offline-run-*")
    shown = [row["samples.path"] for row in logged(folder) if "samples.path" in row]
    return [json.loads((offline / "files" / path).read_text()) for path in shown]


def test_all_samples_so_far_are_one_table(offline):
    first, second = tables(offline[0]["folder"])
    assert first["columns"] == second["columns"] == ["step", "tokens", "prompt", "text", "finish"]
    assert first["data"] == [[*row.values()] for row in SAMPLES[:2]] and second["data"] == [[*row.values()] for row in SAMPLES]


def test_the_offline_run_has_config_group_tags_and_name(offline):
    (record,) = of(inspected(offline[0]["folder"]), "run")
    config = {key: value for key, value in record["config"]["update"].items() if key != "_wandb"}
    assert config == {**CONFIG, "derived_deepspeed": DEEPSPEED, "git": {"commit": "1a2b3c4", "dirty": True}}
    assert (record["project"], record["run_group"], record["tags"]) == ("tessera", "gpt_sotu", ["tensor 2", "fp32", "mine"])
    assert record["job_type"] == "ablation"
    assert record["run_id"] == record["display_name"] == offline[0]["folder"].title


def test_the_offline_run_has_our_axes(offline):
    defined = of(inspected(offline[0]["folder"]), "metric")
    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in defined}
    assert axes == {
        "progress/step": None,
        "progress/tokens": None,
        "train/*": "progress/tokens",
        "val/*": "progress/tokens",
        "eval/*": "progress/tokens",
        "measure/*": "progress/tokens",
        "data/*": "progress/tokens",
        "val/loss": "progress/tokens",
        "val/bits_per_byte": "progress/tokens",
        "perf/*": "progress/step",
        "mem/*": "progress/step",
        "progress/*": "progress/step",
    }


def test_the_offline_run_refers_to_the_checkpoint_and_has_the_alert(offline):
    """The checksums are those of the files; nothing is copied into W&B's folder."""
    assert_has_artifact_and_alert(offline[0]["folder"])


def assert_has_artifact_and_alert(folder):
    (artifact,) = [one for one in of(inspected(folder), "artifact") if one["type"] != "run_table"]  # as W&B keeps the samples
    assert (artifact["name"], artifact["type"], artifact["run_id"]) == (f"{folder.title}-checkpoints", "model", folder.title)
    assert set(artifact["aliases"]) >= {"step_000020"} and json.loads(artifact["metadata"]) == {"step": 20, "tokens": 2000}
    place = folder.checkpoints / "step_000020"
    entries = {entry["path"]: (entry["ref"], int(entry["size"]), entry["digest"]) for entry in artifact["manifest"]["contents"]}
    assert entries == {
        path.name: (path.absolute().as_uri(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in place.iterdir()
    }
    assert not [path for path in folder.wandb.rglob("*") if path.name in entries]
    (alert,) = of(inspected(folder), "alert")
    assert alert["title"] == f"failed · {folder.title}" and alert["text"] == "after step 20 of 20: the loss is nan"
    assert (alert["level"], int(alert["wait_duration"])) == ("ERROR", 600_000)


def test_the_offline_run_is_quiet_tidy_and_says_what_to_do(offline, tmp_path):
    told, errors = offline
    folder = told["folder"]
    assert errors == "" and told["notes"] == []
    assert told["line"] == f"W&B offline (no API key) · later: wandb sync runs/gpt_sotu/{folder.id}/wandb"
    assert [ended["exit_code"] for ended in of(inspected(folder), "exit")] == [0]
    assert list((folder.path.parents[2] / "home").iterdir()) == []
    sync = [Path(sys.executable).with_name("wandb"), "sync", "--dry-run", folder.wandb]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    said = subprocess.run(sync, capture_output=True, text=True, check=True, timeout=BOUND, env=environment)
    assert "Would sync 1 run" in said.stderr + said.stdout


@pytest.mark.slow
@pytest.mark.parametrize("home", ["", "/dev/null/nowhere"])
def test_a_home_that_is_missing_or_cannot_be_written(tmp_path, home):
    told, errors = launch(tmp_path, environment={"HOME": home})
    assert is_whole_offline_run(told) and "offline (no API key)" in told["line"]
    assert "Traceback" not in errors and "INFO" not in errors


def test_disabled_starts_nothing(tmp_path):
    told, errors = launch(tmp_path, mode="disabled")
    assert errors == "" and told["line"].startswith("W&B disabled (as asked) · runs/")
    assert not told["folder"].wandb.exists() and len(list(metrics.read(told["folder"].metrics))) == 3


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WANDB_MODE": "disabled"}, "W&B disabled (as asked)"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "W&B offline (as asked)"),
        pytest.param({"WANDB_API_KEY": "short"}, "W&B offline (what is set as API key cannot be one)", marks=pytest.mark.slow),
        ({"WANDB_BASE_URL": "nonsense"}, "W&B disabled (it did not start)"),
    ],
)
def test_auto_follows_what_wandb_is_told(tmp_path, environment, line):
    told, _ = launch(tmp_path, environment=environment)
    assert told["line"].startswith(line) and len(list(metrics.read(told["folder"].metrics))) == 3
    assert len(told["notes"]) == ("nonsense" in environment.values()) and "\n" not in "".join(told["notes"])


def test_a_key_in_netrc_is_a_key(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {KEY}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    told, _ = launch(tmp_path, environment={"WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert "no answer from http://127.0.0.1:9" in told["line"]


BAD_SERVERS = {
    "refuses the connection": (lambda: "http://127.0.0.1:9", "no answer from"),
    "has no address": (lambda: "http://tessera.invalid", "no answer from"),
    "accepts and never answers": (servers.hung, "no answer from"),
    "answers once": (lambda: servers.serve(servers.Half), "the server did not accept the run"),
    "knows no key": (lambda: servers.serve(servers.Refuses), "the server did not accept the run"),
    "is broken": (lambda: servers.serve(servers.Fails), "the server did not accept the run"),
    "is not W&B": (lambda: servers.serve(servers.Nonsense), "the server did not accept the run"),
}


QUICK = ("knows no key",)
"""The others of BAD_SERVERS are slow tests: most wait for W&B's own patience, and the run of test_loop.py has one that refuses."""


@pytest.mark.parametrize(
    ("server", "why"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in BAD_SERVERS.items()],
)
def test_a_server_that_does_not_work_means_offline(tmp_path, server, why):
    told, _ = launch(tmp_path, server=server())
    assert told["line"].startswith(f"W&B offline ({why}") and is_whole_offline_run(told)


@pytest.mark.slow
def test_online_asked_for_and_not_to_be_had_is_offline(tmp_path):
    told, _ = launch(tmp_path, mode="online")
    assert told["line"].startswith("W&B offline (no API key)") and is_whole_offline_run(told)


@pytest.fixture
def working():
    """The address of a server that works, with empty books."""
    servers.Works.rows.clear()
    servers.Works.runs.clear()
    yield servers.serve(servers.Works)
    servers.Works.stalled.clear()


def test_online_mirrors_every_row(tmp_path, working):
    """The server answers too little for the tables and artifacts of a run under way: that is said once each, and costs nothing else."""
    told, errors = launch(tmp_path, server=working)
    assert told["line"] == f"W&B online · {working}/somebody/tessera/runs/{told['folder'].title}"
    assert [note.partition(" → ")[0] for note in told["notes"]] == [
        "W&B did not take the table of samples", "W&B did not take references to files",
        "W&B sends no alert, for its server has not answered",
    ]  # fmt: skip
    seen = [{key: value for key, value in row.items() if not key.startswith("_")} for row in servers.Works.rows]
    assert [row.get("progress/step") for row in seen] == [10, 20, 20, 20, 20, 20] and seen[0] == ROWS[0] and seen[2] == ROWS[2]
    first = servers.Works.runs[0]
    assert (
        first["groupName"] == "gpt_sotu"
        and first["tags"] == ["tensor 2", "fp32", "mine"]
        and first["jobType"] == "ablation"
        and KEY not in errors
    )


@pytest.mark.slow
def test_a_server_that_falls_silent_does_not_hold_up_the_end(tmp_path, working):
    servers.Works.runs = Falling(servers.Works.stalled)
    told, _ = launch(tmp_path, server=working)
    servers.Works.runs = []
    assert told["line"].startswith("W&B online") and "wandb sync --include-online runs/gpt_sotu/" in told["notes"][-1]
    assert len(list(metrics.read(told["folder"].metrics))) == 3


class Falling(list):
    """Books that stall the server once a run has started."""

    def __init__(self, stalled):
        super().__init__()
        self._stalled = stalled

    def append(self, run):
        super().append(run)
        self._stalled.set()


def test_a_row_without_an_axis_is_refused(tmp_path):
    folder = run_folder.create(tmp_path, "a")
    tracker = Tracker(folder, DESCRIPTION, "disabled")
    with pytest.raises(KeyError, match="progress/tokens"):
        tracker.log({"train/loss": 1.0, "progress/step": 1})
    tracker.finish()
    tracker.finish("failed")
    assert list(metrics.read(folder.metrics)) == []


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = Tracker(run_folder.RunFolder(tmp_path / "none"), None, "online", after=5)
    known = {"log", "samples", "alert", "refer_to_checkpoints", "refer_to_store", "finish", "line"}
    known |= {"write_waiting", "waiting", "write_missing"}
    assert {name for name in vars(Tracker) if not name.startswith("_")} == known
    quiet.write_waiting()
    quiet.write_missing({"metrics": ["{}"]})
    assert quiet.waiting == {}
    quiet.log({})
    quiet.samples([{}])
    quiet.alert("failed", "why")
    quiet.refer_to_checkpoints(every=1)
    quiet.refer_to_store(Path("nowhere"), {})
    quiet.finish("failed")
    assert (quiet.line, quiet.notes, list(tmp_path.iterdir())) == ("", [], [])


def test_wandb_is_imported_only_when_a_run_starts():
    code = "import sys, research.tracking.tracker; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=BOUND).returncode == 0
