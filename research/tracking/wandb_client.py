"""The Weights & Biases (W&B) client: decides the mode, opens a W&B run and closes it. wandb is imported only when a run is opened.

The mode is decided before `wandb.init`: online needs a key *and* a server that answers within seconds; otherwise the run is an
offline run on disk, which `wandb sync` uploads later. Opening an offline run needs no network and has no short time limit, so a busy
machine delays it but does not prevent it.

RUN/wandb.json records the id, project and entity that W&B really used, and the folder that it writes: within a sweep W&B draws an id of
its own. Whoever opens the run again takes them from there.
"""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from parallel.files import read_json, write_json
from research.tracking.format import SEPARATOR
from research.tracking.run_folder import RunFolder

AXES = STEP, TOKENS = "progress/step", "progress/tokens"
OVER_TOKENS, OVER_STEPS = ("train/*", "val/*", "eval/*", "measure/*", "data/*"), ("perf/*", "mem/*", "progress/*")
LOWEST = ("val/loss", "val/bits_per_byte")
PROBE_SECONDS, INIT_SECONDS, FINISH_SECONDS = 2.5, 3.0, 7.0
"""How long a server may take: for its first answer, to accept a run, and for the last upload."""
ALERT_SECONDS, LONGEST_TITLE, LONGEST_TEXT = 600, 63, 2000
LOCAL_SECONDS = 300.0
"""How long W&B's own process on this machine may take to start, and to open an offline run: a busy machine is slow, not broken."""


@dataclass(frozen=True)
class RunDescription:
    """What W&B shows of a run: settings, DeepSpeed's JSON, code, project, group, tags and job type."""

    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    commit: str | None
    dirty: bool
    project: str
    group: str
    tags: Sequence[str] = field(default=())
    job_type: str | None = None


@dataclass(frozen=True)
class Opened:
    """An open W&B run, or why there is none."""

    mode: str
    """online, offline or disabled."""
    why: str
    run: Any = None


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


def describe(folder: RunFolder) -> RunDescription:
    """The description that the run had while it was trained, from the files of its folder."""
    run, config = read_json(folder.run), read_json(folder.config)
    track = config["track"]
    own_tags = [*str(run["layout"]).split(SEPARATOR), str(run["precision"])]
    return RunDescription(
        config,
        read_json(folder.deepspeed) if folder.deepspeed.is_file() else {},
        run.get("commit"),
        bool(run.get("dirty")),
        project=track["project"],
        group=track["group"] or folder.name,
        tags=list(dict.fromkeys([*filter(None, own_tags), *track.get("tags", ())])),
        job_type=track.get("job_type"),
    )


def recorded(folder: RunFolder) -> dict[str, Any]:
    """What RUN/wandb.json says; empty if W&B has not opened this run yet."""
    return read_json(folder.wandb_json) if folder.wandb_json.is_file() else {}


def open_run(
    folder: RunFolder, description: RunDescription, mode: str, *, adds_to_a_run: bool = False, finish_seconds: float = FINISH_SECONDS
) -> Opened:
    """Opens the W&B run: online if that works, else offline. Raises what W&B raises if it cannot open one at all.

    `adds_to_a_run`: W&B's folder holds figures for a run whose rows are in another one, so RUN/wandb.json and W&B's link `latest-run`,
    which `wandb leet` follows, stay at that. `finish_seconds`: how long the last upload of an online run may take.
    """
    # W&B's logs and caches stay in the run folder: HOME may be missing or read-only, and W&B would warn at length. W&B reads
    # these settings only from the environment, which its own process inherits. What the user has set stays.
    folder.wandb.mkdir(exist_ok=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder.wandb.absolute() / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    mode, why = _choose_mode(mode)
    if mode == "disabled":
        return Opened(mode, why)
    _start_process(folder)
    online, offline = _settings(INIT_SECONDS, finish_seconds, adds_to_a_run), _settings(LOCAL_SECONDS, LOCAL_SECONDS, adds_to_a_run)
    run = None
    if mode == "online":
        run = call_with_timeout(lambda: _start("online", folder, description, online), INIT_SECONDS + 0.5)
        if run is None:
            mode, why = "offline", "the server did not accept the run"
            call_with_timeout(end_process, 1.0)
            _start_process(folder)
    if run is None:
        run = _start("offline", folder, description, offline)
    if not adds_to_a_run:
        told = {"id": run.id, "project": run.project, "entity": run.entity or None, "mode": mode}
        write_json(folder.wandb_json, {**told, "url": run.url if mode == "online" else None, "folder": Path(run.dir).parent.name})
    return Opened(mode, why, run)


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


def _start_process(folder: RunFolder) -> None:
    """Starts W&B's own process, which takes as long as the machine needs.

    The id, project and entity of a run that W&B knows already are set for the whole process: within a sweep, W&B ignores those that
    `wandb.init` is given.
    """
    import wandb

    known = recorded(folder)
    identity = {"run_id": known["id"], "project": known["project"], "entity": known["entity"]} if known else {}
    wandb.setup(wandb.Settings(silent=True, x_service_wait=LOCAL_SECONDS, **identity))


def _settings(init_seconds: float, finish_seconds: float, adds_to_a_run: bool) -> Any:
    """W&B's settings: nothing is printed or captured, and both ends have time limits."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        symlink=not adds_to_a_run,
        init_timeout=init_seconds,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
    )


def _start(mode: Literal["online", "offline"], folder: RunFolder, description: RunDescription, settings: Any) -> Any:
    """wandb.init, with our own axes. Raises what W&B raises."""
    import wandb

    known = recorded(folder)
    git = {"commit": description.commit, "dirty": description.dirty}
    run = wandb.init(
        mode=mode,
        dir=str(folder.path),
        project=known.get("project", description.project),
        entity=known.get("entity"),
        group=description.group,
        id=known.get("id", folder.title),
        name=folder.title,
        tags=list(description.tags),
        job_type=description.job_type,
        # the experiment's fields are on top: W&B's columns are then model.num_layers, optimizer.lr, …
        config={**description.config, "derived_deepspeed": dict(description.deepspeed), "git": git},
        resume="allow" if mode == "online" else None,
        settings=settings,
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


@dataclass(frozen=True)
class Alert:
    """A notification of W&B about a run."""

    title: str
    text: str
    level: str
    """INFO, WARN or ERROR."""


def send_alert(run: Any, alert: Alert) -> None:
    """Hands the alert to W&B. Its server drops others with the same title for ALERT_SECONDS."""
    run.alert(alert.title[:LONGEST_TITLE], alert.text[:LONGEST_TEXT], level=alert.level, wait_duration=ALERT_SECONDS)


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


def reason(error: Exception) -> str:
    """What W&B raised, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
