"""What `python -m research VERB` knows, and the argument parser of a verb, whose mistakes are sentences.

A verb is one file research/VERB.py (import_.py for import) with `main(argv: list[str]) -> None` and its line below.
"""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from parallel.errors import Mistake

VERBS = {
    "runs": "list the runs: layout, steps, last bits per byte, status",
    "generate": "let a trained model write: generate RUN --prompt 'My fellow citizens'",
    "evaluate": "put tasks to a trained model: evaluate RUN --tasks validation agreement",
    "serve": "let it answer over HTTP, as OpenAI's servers do: serve RUN",
    "export": "a run for transformers to load: export RUN FOLDER",
    "import": "another program's weights as an experiment: import HF_FOLDER|FILE.gguf --as experiments/NAME",
    "verify": "does the layout change an experiment? verify experiments/gpt_sotu",
    "inspect": "what is in a run or a checkpoint, and is it whole? inspect RUN --check",
    "replay": "run one step again and see where it is not finite: replay RUN --step N",
    "supervise": "launch an experiment, again after a crash: supervise experiments/gpt_sotu",
    "torture": "does a run survive kills? torture experiments/gpt_sotu --trials 50",
}


def nearest(word: str, words: Iterable[str]) -> str:
    """' → did you mean X?' for the closest of `words`, or ' → use one of …' where none is close."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" → did you mean {close[0]}?" if close else f" → use {', '.join(words)}"


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a Mistake that names the nearest option, not a usage dump."""

    def __init__(self, verb: str, description: str):
        super().__init__(prog=f"python -m research {verb}", description=description, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        """The parsed arguments, dashes in their names or underscores; an unknown one is refused by name."""
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        parsed, unknown = self.parse_known_args([_spelled(word, options) for word in args or ()], namespace)
        if unknown:
            raise Mistake(f"{self.prog} does not know {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say as a Mistake."""
        raise Mistake(f"{self.prog}: {message} → see {self.prog} --help")


def _spelled(word: str, options: list[str]) -> str:
    """`--max-new-tokens=5` as `--max_new_tokens=5`, where that is what the option is called."""
    name, equals, value = word.partition("=")
    known = "--" + name.removeprefix("--").replace("-", "_")
    return known + equals + value if name.startswith("--") and known in options else word
