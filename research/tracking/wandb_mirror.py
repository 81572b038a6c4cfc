"""What an offline W&B run is written again from, where the first one broke: the run folder's own files."""
# MERGED-DOC """What W&B is told of a run, and which of the experiment's settings say so."""
# MERGED-DOC """A call that may hang, held to a time."""

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
from typing import Any, Literal, Protocol

from research.tracking import metrics
from research.tracking.run_folder import RunFolder


class Tracked(Protocol):
    """The fields of research.config.Track that tracking reads."""

    project: str
    group: str | None

    @property
    def mode(self) -> str:
        """auto, online, offline or disabled; read-only here, so that a schema may allow just these."""


@dataclass(frozen=True)
class RunDescription:
    """What a run is, as W&B shows it: the resolved experiment, the DeepSpeed JSON derived from it, the code, family and tags."""

    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    commit: str | None
    dirty: bool
    family: str
    tags: Sequence[str] = field(default=())

    def as_config(self) -> dict[str, Any]:
        """One nested dict. The experiment's fields are on top (W&B's columns are then model.num_layers, optimizer.lr, …)."""
        return {**self.config, "derived_deepspeed": dict(self.deepspeed), "git": {"commit": self.commit, "dirty": self.dirty}}


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """The call's result if it comes within `seconds`; None if it does not, or if the call raises. A call that is late goes on unheard."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception:  # the caller is told by None
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    return result[0] if result else None


STEP, TOKENS, OFFLINE = "progress/step", "progress/tokens", "offline-run-*"
TEXTS = ("prompt", "text", "finish")


def sample_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples.jsonl as W&B gets it: 'prompt', 'text' and 'finish' are 'sample/prompt', 'sample/text' and 'sample/finish'."""
    return {f"sample/{key}" if key in TEXTS else key: value for key, value in sample.items()}


def table_row(sample: Mapping[str, Any]) -> list[Any]:
    """The same as a row of the table: step, tokens, prompt, text, finish (none in a row of an older run)."""
    return [sample.get(key) for key in (STEP, TOKENS, *TEXTS)]


def rows(folder: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    """Every row later than step `after` that W&B was or should have been given, in order: by step, a step's samples after its metrics."""
    samples = [sample_row(sample) for sample in metrics.read(folder.samples)]
    return sorted((row for row in [*metrics.read(folder.metrics), *samples] if row[STEP] > after), key=lambda row: row[STEP])


@contextmanager
def replacing(broken: Path) -> Iterator[None]:
    """Puts the offline run folder `broken` aside while the block writes another beside it, and removes it after that.

    If the block raises, what it wrote goes and `broken` is back: part of the rows is better than none.
    """
    aside = broken.with_name(f".{broken.name}")  # its name holds the second it was made in, the other's may be the same
    broken.rename(aside)
    others = set(broken.parent.glob(OFFLINE))
    try:
        yield
    except BaseException:
        for half in set(broken.parent.glob(OFFLINE)) - others:
            shutil.rmtree(half, ignore_errors=True)
        aside.rename(broken)
        raise
    shutil.rmtree(aside, ignore_errors=True)


AXES = ("progress/step", "progress/tokens")
OVER_TOKENS, OVER_STEPS = ("train/*", "val/*", "eval/*"), ("perf/*", "progress/*")
LOWEST = ("val/loss", "val/bits_per_byte")
TABLE_ROWS, TABLE_SECONDS = 1000, 3.0
"""Of W&B's table of samples, which is sent whole each time: the newest rows, and how long training waits for W&B to take it."""
START_SECONDS, PROBE_SECONDS, INIT_SECONDS, FINISH_SECONDS = 9.5, 2.5, 3.0, 7.0
"""The bounds of the whole start, in it of the server's first answer and of wandb.init, and of the last upload."""


class WandbMirror:
    """One W&B run, or none where the mode is disabled or W&B cannot be used at all."""

    def __init__(self, folder: RunFolder, track: Tracked, about: RunDescription, notes: list[str], after: int = 0):
        self._notes, self._folder, self._as_started, self._after = notes, folder, (folder, track, about), after
        self._run: Any = None
        self._takes_tables = True
        self._broken: str | None = None
        """The note on why W&B was left alone before its end."""
        self.mode, why = "disabled", "as asked"
        if track.mode != "disabled":
            opened = bounded(lambda: self._guard(lambda: open_run(folder, track, about), "start"), START_SECONDS)
            self.mode, why, self._run = opened or ("disabled", "it did not start", None)
        self.line = _line(self.mode, why, folder, self._run)

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue a row; W&B's own process sends it."""
        run = self._run
        if run is not None:
            self._guard(lambda: run.log(dict(row)), "take a row")

    def log_table(self) -> None:
        """Queue the table of all samples. Online that asks the server something first: once it has not answered in time, never again."""
        run = self._run
        if run is None or not self._takes_tables:
            return
        self._takes_tables = bool(bounded(lambda: run.log(_table(self._folder)) or True, TABLE_SECONDS))
        if not self._takes_tables:
            self._notes.append("W&B did not take the table of samples → each sample is a row there, and samples.jsonl has all")

    def finish(self, exit_code: int) -> None:
        """Let W&B write what it has; what it could not send stays in the folder for `wandb sync`. FINISH_SECONDS + 2 at most."""
        ends = time.monotonic() + FINISH_SECONDS + 1
        run, self._run = self._run, None
        done = run is None or bounded(lambda: self._guard(lambda: finish_run(run, exit_code), "finish"), FINISH_SECONDS + 1)
        if self._broken and self.mode == "offline":
            if bounded(lambda: self._write_again(exit_code, ends), ends - time.monotonic()):
                self._notes[:] = [note for note in self._notes if note != self._broken]
        elif not done and not self._broken:
            self._notes.append(
                f"W&B did not take everything → wandb sync --include-online {_first_line(self._folder.wandb)} sends the rest"
            )
        if self.mode != "disabled":
            bounded(end_process, 1.0)

    def _write_again(self, exit_code: int, ends: float) -> bool:
        """The offline run anew, in W&B processes of its own, from the run folder's files; the broken one goes once that is done."""
        with replacing(max(self._folder.wandb.glob(OFFLINE))):  # named by the time they were opened at: ours is the last
            bounded(end_process, 1.0)
            run = _start("offline", *self._as_started)
            for row in rows(self._folder, self._after):
                if time.monotonic() > ends:
                    raise TimeoutError
                run.log(row)
            if self._folder.samples.stat().st_size:
                run.log(_table(self._folder))
            run.finish(exit_code=exit_code)
        return True

    def _guard(self, call: Callable[[], Any], what: str) -> Any:
        """The call's result; if it raises, None, a note, and W&B is left alone from then on."""
        try:
            return call()
        except Exception as error:  # W&B is a mirror: whatever it raises must not reach the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._broken = f"W&B could not {what} ({reason[:200]}) → nothing is lost, metrics.jsonl has every row"
            self._notes.append(self._broken)
            self._run = None
            return None


def open_run(folder: RunFolder, track: Tracked, about: RunDescription) -> tuple[str, str, Any]:
    """(mode, why, the W&B run): online if that works, else offline."""
    _own_folders(folder)
    mode, why = _choose_mode(track.mode)
    if mode == "online":
        if run := bounded(lambda: _start("online", folder, track, about), INIT_SECONDS + 0.5):
            return mode, why, run
        mode, why = "offline", "the server did not accept the run"
        bounded(end_process, 1.0)
    return mode, why, _start("offline", folder, track, about) if mode == "offline" else None


def _line(mode: str, why: str, folder: RunFolder, run: Any) -> str:
    if mode == "online" and run is not None:
        return f"W&B online · {run.url}"
    if mode == "offline":
        return f"W&B offline ({why}) · later: wandb sync {_first_line(folder.wandb)}"
    return f"W&B {mode} ({why}) · {_first_line(folder.metrics)}"


def _first_line(path: Path) -> Path:
    """The path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _own_folders(folder: RunFolder) -> None:
    """Keep W&B's logs and caches in the run folder: HOME may be missing or read-only, and W&B would say so at length.

    W&B reads these only from the environment, and hands that on to its own process. What the user has set stays.
    """
    folder.wandb.mkdir(exist_ok=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder.wandb.absolute() / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _choose_mode(asked: str) -> tuple[str, str]:
    """(mode, why). `auto` is what WANDB_MODE says, and online where it says nothing; online without a key or a server is offline."""
    settings = _settings()
    wanted = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(settings.mode, "online") if asked == "auto" else asked
    if wanted != "online":
        return wanted, "as asked"
    if problem := _key_problem(settings.base_url):
        return "offline", problem
    if not bounded(lambda: _answers(settings.base_url), PROBE_SECONDS):
        return "offline", f"no answer from {settings.base_url}"
    return "online", ""


def _settings() -> Any:
    """W&B's settings as its files and variables give them; nothing is printed and no process is started."""
    import wandb
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    wandb.termsetup(wandb.Settings(silent=True), None)
    return settings


def _key_problem(host: str) -> str | None:
    """None where W&B finds credentials for this server by itself: variable, netrc or settings file. Never asks the user."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        found = wbauth.authenticate_session(host=host, source="tessera", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError:
        return "what is set as API key cannot be one"
    return None if found else "no API key"


def _answers(url: str) -> bool:
    """True if the server says anything at all over HTTP (proxies are honoured); connecting is not enough, it may be hung."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:  # an answer, if not a friendly one
        return True
    except OSError as error:
        return "CERTIFICATE" in str(error)  # alive; W&B has its own say about certificates
    return True


def _start(mode: Literal["online", "offline"], folder: RunFolder, track: Tracked, about: RunDescription) -> Any:
    """wandb.init with our own axes. Raises whatever W&B raises."""
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
    run = wandb.init(
        mode=mode,
        dir=str(folder.path),
        project=track.project,
        group=track.group or about.family,
        id=folder.title,
        name=folder.title,
        tags=list(about.tags),
        config=about.as_config(),
        resume="allow" if mode == "online" else None,
        settings=quiet,
    )
    if mode == "online" and not run.url:
        raise ConnectionError("the server gave the run no address")  # something answers, but it is not W&B
    _define_axes(run)
    return run


def finish_run(run: Any, exit_code: int) -> bool:
    """True if all was written in time."""
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        return False
    return True


def _table(folder: RunFolder) -> dict[str, Any]:
    """All samples of the run, those before a resume too, as one table of W&B's; of very many the newest."""
    import wandb

    names = ("step", "tokens", *TEXTS)
    found = list(metrics.read(folder.samples))[-TABLE_ROWS:]
    axes = {axis: found[-1][axis] for axis in AXES}
    return {**axes, "samples": wandb.Table(columns=list(names), data=[table_row(row) for row in found])}


def _define_axes(run: Any) -> None:
    """Our own x axes (W&B renumbers its `_step` when it syncs), and the lowest validation loss in the run's summary."""
    for axis in AXES:
        run.define_metric(axis)
    for names, axis in ((OVER_TOKENS, "progress/tokens"), (OVER_STEPS, "progress/step")):
        for name in names:
            run.define_metric(name, step_metric=axis)
    for name in LOWEST:
        run.define_metric(name, step_metric="progress/tokens", summary="min,last")


def end_process() -> bool:
    """End W&B's own process. Needed after a failed start (an offline run is refused before), and at the end: what W&B
    would otherwise do when Python exits has no bound and shows its tracebacks."""
    import wandb

    wandb.teardown()
    return True
