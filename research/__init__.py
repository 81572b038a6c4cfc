"""How is a question put to a model and answered? Data, training, evaluation, generation, serving, tracking."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The tree this package lies in: experiments/ and runs/ are beside it."""
