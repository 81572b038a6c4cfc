"""Mirrors a run to Weights & Biases (W&B): opens, feeds and finishes the W&B run. wandb is imported only when a run starts.

A run must never fail or wait because of W&B. So the mode is decided before `wandb.init`: online needs a key *and* a server
that answers; otherwise the run is an offline run on disk, which `wandb sync` uploads later. Start and finish are each limited to
ten seconds; a row is written to metrics.jsonl first; what W&B raises becomes one sentence in `Tracker.notes`.

W&B writes through a process of its own, which can die before the run does: Ctrl-C on the `deepspeed` command ends it. The offline
run then has no rows, so `finish` writes it again from metrics.jsonl and samples.jsonl.
"""

import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from research.tracking import metrics
from research.tracking.format import short_path
from research.tracking.run_folder import RunFolder

AXES = STEP, TOKENS = "progress/step", "progress/tokens"
OVER_TOKENS, OVER_STEPS = ("train/*", "val/*", "eval/*"), ("perf/*", "progress/*")
LOWEST = ("val/loss", "val/bits_per_byte")
TEXTS = ("prompt", "text", "finish")
OFFLINE = "offline-run-*"
TABLE_ROWS, TABLE_SECONDS = 1000, 3.0
"""Of W&B's table of samples, which is sent whole each time: how many rows, the newest, and how long training waits for W&B to take it."""
START_SECONDS, PROBE_SECONDS, INIT_SECONDS, FINISH_SECONDS = 9.5, 2.5, 3.0, 7.0
"""Limits of the whole start, of the server's first answer and of wandb.init within it, and of the last upload."""


@dataclass(frozen=True)
class RunDescription:
    """What W&B shows of a run: the resolved settings, the DeepSpeed JSON derived from them, the code, project, group, tags and job type."""

    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    commit: str | None
    dirty: bool
    project: str
    group: str
    tags: Sequence[str] = field(default=())
    job_type: str | None = None


class WandbMirror:
    """One W&B run; none if the mode is disabled or W&B cannot be used at all."""

    def __init__(self, folder: RunFolder, description: RunDescription, mode: str, notes: list[str], after: int = 0):
        self._notes, self._folder, self._description, self._after = notes, folder, description, after
        self._run: Any = None
        self._takes_tables = True
        self._failure: str | None = None
        """The note that says why W&B was given up before the end of the run."""
        self.mode, why = "disabled", "as asked"
        if mode != "disabled":
            opened = call_with_timeout(lambda: self._guard(lambda: open_run(folder, description, mode), "start"), START_SECONDS)
            self.mode, why, self._run = opened or ("disabled", "it did not start", None)
        self.line = f"W&B {self.mode} ({why}) · {short_path(folder.metrics)}"
        if self.mode == "online" and self._run is not None:
            self.line = f"W&B online · {self._run.url}"
        elif self.mode == "offline":
            self.line = f"W&B offline ({why}) · later: wandb sync {short_path(folder.wandb)}"

    def log(self, row: Mapping[str, Any]) -> None:
        """Queues a row; W&B's own process sends it."""
        run = self._run
        if run is not None:
            self._guard(lambda: run.log(dict(row)), "take a row")

    def log_table(self) -> None:
        """Queues the table of all samples. Online this waits for the server; if it does not answer in time, no table is sent again."""
        run = self._run
        if run is None or not self._takes_tables:
            return
        self._takes_tables = bool(call_with_timeout(lambda: run.log(_table(self._folder)) or True, TABLE_SECONDS))
        if not self._takes_tables:
            self._notes.append("W&B did not take the table of samples → each sample is a row there, and samples.jsonl has all")

    def finish(self, exit_code: int) -> None:
        """Lets W&B write what it has; what it could not send stays in the folder for `wandb sync`. FINISH_SECONDS + 2 at most."""
        ends = time.monotonic() + FINISH_SECONDS + 1
        run, self._run = self._run, None
        done = run is None or call_with_timeout(lambda: self._guard(lambda: finish_run(run, exit_code), "finish"), FINISH_SECONDS + 1)
        if self._failure and self.mode == "offline":
            if call_with_timeout(lambda: self._write_again(exit_code, ends), ends - time.monotonic()):
                self._notes[:] = [note for note in self._notes if note != self._failure]
        elif not done and not self._failure:
            self._notes.append(f"W&B did not take everything → wandb sync --include-online {short_path(self._folder.wandb)} sends the rest")
        if self.mode != "disabled":
            call_with_timeout(end_process, 1.0)

    def _write_again(self, exit_code: int, ends: float) -> bool:
        """Writes the offline run anew, through new W&B processes, from the run folder's files; the broken one is removed after that."""
        with replacing(max(self._folder.wandb.glob(OFFLINE))):  # named by the time they were opened at: ours is the last
            call_with_timeout(end_process, 1.0)
            run = _start("offline", self._folder, self._description)
            for row in rows(self._folder, self._after):
                if time.monotonic() > ends:
                    raise TimeoutError
                run.log(row)
            if self._folder.samples.stat().st_size:
                run.log(_table(self._folder))
            run.finish(exit_code=exit_code)
        return True

    def _guard(self, call: Callable[[], Any], what: str) -> Any:
        """The call's result. If it raises: None; a note is made and W&B is not used any more."""
        try:
            return call()
        except Exception as error:  # W&B is a mirror: whatever it raises must not reach the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._failure = f"W&B could not {what} ({reason[:200]}) → nothing is lost, metrics.jsonl has every row"
            self._notes.append(self._failure)
            self._run = None
            return None


def call_with_timeout(call: Callable[[], Any], seconds: float) -> Any:
    """The call's result if it returns within `seconds`; None if it does not, or if it raises. A late call goes on in its thread."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception:  # the caller gets None
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    return result[0] if result else None


def open_run(folder: RunFolder, description: RunDescription, mode: str) -> tuple[str, str, Any]:
    """(mode, why, the W&B run): online if that works, else offline."""
    # W&B's logs and caches stay in the run folder: HOME may be missing or read-only, and W&B would warn at length. W&B reads
    # these settings only from the environment, which its own process inherits. What the user has set stays.
    folder.wandb.mkdir(exist_ok=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder.wandb.absolute() / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    mode, why = _choose_mode(mode)
    if mode == "online":
        if run := call_with_timeout(lambda: _start("online", folder, description), INIT_SECONDS + 0.5):
            return mode, why, run
        mode, why = "offline", "the server did not accept the run"
        call_with_timeout(end_process, 1.0)
    return mode, why, _start("offline", folder, description) if mode == "offline" else None


def _choose_mode(mode: str) -> tuple[str, str]:
    """(mode, why). `auto` means what WANDB_MODE says, online if it says nothing. Online without a key or a server becomes offline."""
    import wandb
    from wandb.sdk import wandb_setup

    # W&B's settings as its files and variables give them; nothing is printed and no process is started
    settings = wandb_setup.singleton().settings
    wandb.termsetup(wandb.Settings(silent=True), None)
    if mode == "auto":
        mode = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(settings.mode, "online")
    if mode != "online":
        return mode, "as asked"
    if problem := _key_problem(settings.base_url):
        return "offline", problem
    if not call_with_timeout(lambda: _answers(settings.base_url), PROBE_SECONDS):
        return "offline", f"no answer from {settings.base_url}"
    return "online", ""


def _key_problem(host: str) -> str | None:
    """None if W&B finds credentials for this server by itself, in a variable, netrc or a settings file. The user is never prompted."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        credentials = wbauth.authenticate_session(host=host, source="tessera", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError:
        return "what is set as API key cannot be one"
    return None if credentials else "no API key"


def _answers(url: str) -> bool:
    """Whether the server answers anything at all over HTTP (proxies are honoured). A connection alone is not enough: it may hang."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:  # an answer, if an error
        return True
    except OSError as error:
        return "CERTIFICATE" in str(error)  # it answers; W&B has its own rules about certificates
    return True


def _start(mode: Literal["online", "offline"], folder: RunFolder, description: RunDescription) -> Any:
    """wandb.init, with our own axes. Raises what W&B raises."""
    import wandb

    quiet = wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        x_service_wait=8,
    )
    git = {"commit": description.commit, "dirty": description.dirty}
    run = wandb.init(
        mode=mode,
        dir=str(folder.path),
        project=description.project,
        group=description.group,
        id=folder.title,
        name=folder.title,
        tags=list(description.tags),
        job_type=description.job_type,
        # the experiment's fields are on top: W&B's columns are then model.num_layers, optimizer.lr, …
        config={**description.config, "derived_deepspeed": dict(description.deepspeed), "git": git},
        resume="allow" if mode == "online" else None,
        settings=quiet,
    )
    if mode == "online" and not run.url:
        raise ConnectionError("the server gave the run no address")  # something answers, but it is not W&B

    # our own x axes (W&B renumbers its `_step` when it syncs), and the lowest validation loss in the run's summary
    for axis in AXES:
        run.define_metric(axis)
    for names, axis in ((OVER_TOKENS, TOKENS), (OVER_STEPS, STEP)):
        for name in names:
            run.define_metric(name, step_metric=axis)
    for name in LOWEST:
        run.define_metric(name, step_metric=TOKENS, summary="min,last")
    return run


def finish_run(run: Any, exit_code: int) -> bool:
    """Whether everything was written in time."""
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        return False
    return True


def end_process() -> bool:
    """Ends W&B's own process. This is needed after a failed start (until then W&B refuses an offline run), and at the end: what W&B
    would otherwise do when Python exits has no time limit and prints tracebacks."""
    import wandb

    wandb.teardown()
    return True


def sample_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples.jsonl as W&B gets it: 'prompt', 'text' and 'finish' are 'sample/prompt', 'sample/text' and 'sample/finish'."""
    return {f"sample/{key}" if key in TEXTS else key: value for key, value in sample.items()}


def rows(folder: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    """Every row later than step `after` that W&B was or should have been given, ordered by step; a step's samples follow its metrics."""
    samples = [sample_row(sample) for sample in metrics.read(folder.samples)]
    return sorted((row for row in [*metrics.read(folder.metrics), *samples] if row[STEP] > after), key=lambda row: row[STEP])


def _table(folder: RunFolder) -> dict[str, Any]:
    """All samples of the run, those before a resume included, as one W&B table; if there are very many, the newest."""
    import wandb

    samples = list(metrics.read(folder.samples))[-TABLE_ROWS:]
    data = [[sample.get(key) for key in (STEP, TOKENS, *TEXTS)] for sample in samples]  # an older run's have no `finish`
    return {**{axis: samples[-1][axis] for axis in AXES}, "samples": wandb.Table(columns=["step", "tokens", *TEXTS], data=data)}


@contextmanager
def replacing(broken: Path) -> Iterator[None]:
    """Moves the offline run folder `broken` aside while the block writes another beside it, and removes it after that.

    If the block raises, what it wrote is removed and `broken` is moved back: part of the rows is better than none.
    """
    aside = broken.with_name(f".{broken.name}")  # a folder's name is the second it was made in, so both may have the same
    broken.rename(aside)
    others = set(broken.parent.glob(OFFLINE))
    try:
        yield
    except BaseException:
        for incomplete in set(broken.parent.glob(OFFLINE)) - others:
            shutil.rmtree(incomplete, ignore_errors=True)
        aside.rename(broken)
        raise
    shutil.rmtree(aside, ignore_errors=True)
