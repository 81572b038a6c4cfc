"""`python -m research VERB …`: imports the verb's file and calls its `main`. Imports nothing else, so that --help is fast."""

import importlib
import keyword
import sys

from parallel.errors import Mistake
from research import ROOT
from research.cli.verbs import VERBS, suggestion
from research.cluster.exit_codes import refused_files, show_mistake
from research.cluster.software import versions
from research.tracking.streams import flushed_output, prepare_streams

HELP = """usage: python -m research VERB …

Prepares text, inspects runs and uses the models they have trained. A run is named by its folder: runs/gpt_sotu/latest, or just gpt_sotu.

{verbs}

python -m research VERB --help says more, --version shows which code this is. Training is not a verb:
deepspeed experiments/gpt_sotu/launch.py"""


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit code: 2 for a Mistake, 130 for Ctrl-C."""
    try:
        with flushed_output(), refused_files():
            return _dispatch(argv)
    except Mistake as mistake:
        show_mistake(mistake)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0  # the reader of the output has left


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())))
        return 0 if argv else 2
    if argv[0] == "--version":
        print(versions(ROOT))
        return 0
    if argv[0] not in VERBS:
        raise Mistake(f"python -m research does not know {argv[0]}{suggestion(argv[0], VERBS)}")
    try:
        verb = importlib.import_module(f"research.cli.{file_of(argv[0])}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("research", "models", "parallel"):
            raise
        way_out = "source .venv/bin/activate, or pip install -r requirements.txt"
        raise Mistake(f"this Python has no package {error.name} → {way_out}") from error
    verb.main(argv[1:])
    return 0


def file_of(verb: str) -> str:
    """The name of the verb's file without its .py: a keyword of Python gets an underscore."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main(sys.argv[1:]))
