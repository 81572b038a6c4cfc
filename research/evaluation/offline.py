"""Keeps the libraries of lm-evaluation-harness off the network and out of the user's home: they are told so by the environment only."""

import os
from pathlib import Path

OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def keep_offline(cache: Path) -> None:
    """Before `datasets` is imported. Local files are converted in `cache`; a cache that the user has named stays."""
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks a process that has threads and perhaps a GPU
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
