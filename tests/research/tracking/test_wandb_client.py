"""Calls with a time limit, and what a run folder says of its W&B run."""

import time
from pathlib import Path

from parallel.files import write_json
from research.tracking import run_folder, wandb_client
from research.tracking.wandb_client import call_with_timeout

LONG = 30.0


def test_a_result_or_none():
    assert call_with_timeout(lambda: 3, LONG) == 3
    assert call_with_timeout(lambda: 1 / 0, LONG) is None


def test_what_takes_too_long_is_left():
    began = time.monotonic()
    assert call_with_timeout(lambda: time.sleep(LONG), 0.1) is None
    assert call_with_timeout(lambda: time.sleep(LONG), -1.0) is None  # what is left of a time that is up
    assert time.monotonic() - began < LONG / 2


def test_the_description_is_what_the_files_say(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path, "gpt")
    run_folder.start(folder, layout="pipe 1 × data 1 × tensor 2", precision="bf16", steps=3, commit="1a2b3c4", dirty=True)
    config = {"track": {"project": "p", "group": None, "tags": ["first", "bf16"], "job_type": "sweep"}}
    write_json(folder.config, config)
    described = wandb_client.describe(folder)
    assert (described.config, described.commit, described.dirty) == (config, "1a2b3c4", True)
    assert (described.project, described.group, described.job_type) == ("p", "gpt", "sweep")
    assert described.tags == ["pipe 1 × data 1 × tensor 2", "bf16", "first"] and described.deepspeed == {}
