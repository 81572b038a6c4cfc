"""Mirrors a run to Weights & Biases (W&B) from a thread of its own: opens, feeds and finishes the W&B run.

A run must never fail or wait because of W&B, and must not lose its record because a machine is busy. So W&B is opened in the background:
rows queue up until it takes them, in offline mode as long as that takes. A row is written to metrics.jsonl first; what W&B raises becomes
one sentence in `Tracker.notes`; and whatever W&B has missed, `python -m research track` writes from metrics.jsonl.

W&B writes through a process of its own, which can die before the run does: Ctrl-C on the `deepspeed` command ends it. The offline
run then has no rows, so it is written again from the run folder when the run ends.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.tracking import metrics, wandb_artifacts, wandb_client, wandb_record
from research.tracking.format import short_path
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_artifacts import References
from research.tracking.wandb_client import (
    FINISH_SECONDS,
    Opened,
    RunDescription,
    call_with_timeout,
    end_process,
    finish_run,
    open_run,
    reason,
)

HEADER_SECONDS = 9.0
"""How long the header waits for W&B before it says that W&B is still starting."""
TABLE_SECONDS = 3.0
"""How long W&B may take to accept a table of samples."""
STOPPED_SECONDS, OFFLINE_SECONDS = FINISH_SECONDS + 1, 20.0
"""How long the end of a run waits for W&B: of one that was stopped or is online, and of one that is finished and offline."""


class WandbMirror:
    """One W&B run; none if the mode is disabled or W&B cannot be used at all."""

    def __init__(self, folder: RunFolder, description: RunDescription, mode: str, notes: list[str], after: int = 0):
        self._folder, self._description, self._notes, self._after = folder, description, notes, after
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        """What to do with the W&B run, in order; None: the run has ended."""
        self._opened: Opened | None = None
        self._takes_tables = self._takes_references = True
        self._alerts: list[wandb_client.Alert] = []
        self._references: list[Callable[[], References]] = []
        self._failure = ""
        """The note that says why W&B was given up before the end of the run."""
        self._exit_code = 0
        self._left = threading.Event()
        """Set when nobody waits for W&B any more."""
        self._thread: threading.Thread | None = None
        self._late = False
        if mode == "disabled":
            self._opened = Opened("disabled", "as asked")
            return
        is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(mode, is_open), daemon=True)
        self._thread.start()
        self._late = not is_open.wait(HEADER_SECONDS)

    @property
    def line(self) -> str:
        """Where W&B's rows go and how to upload them later, as far as it is known by now."""
        rows, opened = short_path(self._folder.metrics), self._opened
        if opened is None:
            return f"W&B is still starting · {rows}"
        if opened.mode == "online":
            return f"W&B online · {opened.run.url}"
        if opened.mode == "offline":
            return f"W&B offline ({opened.why}) · later: wandb sync {short_path(self._folder.wandb)}"
        return f"W&B disabled ({opened.why}) · {rows}"

    def log(self, row: Mapping[str, Any]) -> None:
        """Queues a row."""
        values = dict(row)
        self._calls.put(lambda run: run.log(values))

    def log_table(self) -> None:
        """Queues the table of all samples so far."""
        samples = list(metrics.read(self._folder.samples))
        self._calls.put(lambda run: self._log_table(run, samples))

    def alert(self, title: str, text: str, level: str) -> None:
        """Queues a notification, which W&B sends online, or when an offline run is synced."""
        alert = wandb_client.Alert(title, text, level)
        self._alerts.append(alert)
        self._calls.put(lambda run: self._send_alert(run, alert))

    def refer_to(self, make: Callable[[], References]) -> None:
        """Queues an artifact of references; `make` is called in W&B's thread, and may raise."""
        self._references.append(make)
        self._calls.put(lambda run: self._log_references(run, make))

    def finish(self, exit_code: int) -> None:
        """Lets W&B write what it has, and waits for that for a limited time. What is missing then can be written later."""
        if self._thread is None:
            return
        thread, self._thread, self._exit_code = self._thread, None, exit_code
        self._calls.put(None)
        online = self._opened is not None and self._opened.mode == "online"
        thread.join(STOPPED_SECONDS if exit_code or online else OFFLINE_SECONDS)
        self._left.set()
        if thread.is_alive():
            self._notes.append(f"W&B did not take everything in time → {self._send_rest() if online else self._write_later()}")
        elif self._late and not self._failure:
            self._notes.append(f"W&B started late · {self.line.removeprefix('W&B ')}")
        call_with_timeout(end_process, 1.0)

    def _work(self, mode: str, is_open: threading.Event) -> None:
        """The thread: opens the W&B run, carries out what is queued, and finishes it."""
        others = set(self._folder.wandb.glob(wandb_record.OFFLINE))  # of the segments before a resume
        opened = self._guard("start", open_run, self._folder, self._description, mode) or Opened("disabled", "it did not start")
        self._opened = opened
        is_open.set()
        while (call := self._calls.get()) is not None:
            if opened.run is not None and not self._failure:
                self._guard("take a row", call, opened.run)
        if opened.run is not None and not self._failure:
            self._guard("finish", self._finish, opened.run)
        if self._failure and opened.mode != "online" and not self._left.is_set():
            self._write_again(set(self._folder.wandb.glob(wandb_record.OFFLINE)) - others)

    def _log_table(self, run: Any, samples: list[wandb_record.Row]) -> None:
        """Online this waits for the server; if it does not answer in time, no table is sent again."""
        if self._opened is None or self._opened.mode != "online":
            run.log(wandb_record.table(samples))
        elif self._takes_tables:
            answers = self._takes_references
            self._takes_tables = answers and bool(call_with_timeout(lambda: run.log(wandb_record.table(samples)) or True, TABLE_SECONDS))
            if not self._takes_tables:
                self._notes.append("W&B did not take the table of samples → each sample is a row there, and samples.jsonl has all")

    def _send_alert(self, run: Any, alert: wandb_client.Alert) -> None:
        """Online only while the server answers: W&B's own process does not end before a server has taken an alert."""
        if self._opened is None or self._opened.mode != "online" or (self._takes_tables and self._takes_references):
            self._try("send an alert", wandb_client.send_alert, run, alert)
        else:
            self._notes.append("W&B sends no alert, for its server has not answered → run.json says how the run has ended")

    def _log_references(self, run: Any, make: Callable[[], References]) -> None:
        """Online W&B asks its server first; if that does not answer in time, it is asked no more."""
        if self._opened is None or self._opened.mode != "online":
            self._try("refer to files", lambda: wandb_artifacts.log(run, make()))
        elif self._takes_references:
            answers = self._takes_tables  # a server that was silent once is not waited for again
            self._takes_references = answers and bool(call_with_timeout(lambda: wandb_artifacts.log(run, make()), TABLE_SECONDS))
            if not self._takes_references:
                self._notes.append("W&B did not take references to files → no checkpoint and no store is an artifact there")

    def _finish(self, run: Any) -> None:
        if row := wandb_record.pictures(self._folder):
            run.log(row)
        if not finish_run(run, self._exit_code):
            self._notes.append(f"W&B did not take everything in time → {self._send_rest()}")

    def _write_again(self, broken: set[Path]) -> None:
        """Writes the offline run anew, through a new W&B process, from the run folder's files; the broken one is removed after that."""
        call_with_timeout(end_process, 1.0)
        try:
            with wandb_record.replacing(self._folder.wandb, sorted(broken)):
                wandb_record.write(
                    self._folder,
                    self._description,
                    "offline",
                    self._exit_code,
                    after=self._after,
                    references=self._references,
                    alerts=self._alerts,
                )
        except Exception:  # the note on the first failure stays
            return
        self._notes[:] = [note for note in self._notes if note != self._failure]

    def _guard(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result. If it raises: None; a note is made and W&B is not used any more."""
        try:
            return call(*arguments)
        except Exception as error:  # W&B is a mirror: whatever it raises must not reach the run
            self._failure = f"W&B could not {what} ({reason(error)}) → {self._write_later()}"
            if not self._left.is_set():
                self._notes.append(self._failure)
            return None

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Like `_guard`, for what W&B can do without: a note is made, and W&B goes on being used."""
        try:
            call(*arguments)
        except Exception as error:  # W&B is a mirror: whatever it raises must not reach the run
            self._notes.append(f"W&B could not {what} ({reason(error)})")

    def _write_later(self) -> str:
        return f"metrics.jsonl has every row: `python -m research track {self._folder.shown}` writes them to W&B"

    def _send_rest(self) -> str:
        return f"wandb sync --include-online {short_path(self._folder.wandb)} sends the rest"
