"""Research with models: data, training, evaluation, generation, serving, tracking, verification."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds this package, with experiments/ and runs/ beside it."""
