"""The verbs of `python -m research VERB`, and their argument parser, which raises a Mistake instead of printing a usage message.

A verb is a file research/cli/VERB.py (import_.py for `import`) with `main(argv: list[str]) -> None`, and a line in VERBS.
"""

import argparse
from collections.abc import Iterable
from typing import NoReturn

from parallel.errors import Mistake, nearest

VERBS = {
    "prepare": "turn your own text into a corpus to train on: prepare book.txt notes/ --as mine",
    "runs": "list the runs: status, steps, bits per byte, and what differs",
    "generate": "continue a prompt with a trained model: generate RUN --prompt 'My fellow citizens'",
    "embed": "turn texts into vectors with a BERT: embed RUN --text 'A man eats.' --text 'A man is eating.'",
    "evaluate": "evaluate a trained model on tasks: evaluate RUN --tasks validation agreement",
    "serve": "serve a trained model over HTTP, with OpenAI's API: serve RUN",
    "export": "write a run for transformers to load: export RUN FOLDER",
    "import": "turn another program's weights into an experiment: import HF_FOLDER|FILE.gguf --as experiments/NAME",
    "plot": "draw the metrics of one run, or of several over each other: plot RUN RUN",
    "compare": "is a difference more than noise? compare experiments over their seeds: compare A B",
    "ablate": "train a fork and its parent with the same seeds, and keep the comparison with it: ablate FORK",
    "track": "write a run to Weights & Biases from its metrics.jsonl: track RUN",
    "fork": "copy an experiment and change settings in the copy: fork experiments/gpt_sotu experiments/mine --set seed=2",
    "diff": "what differs between two experiments, runs or checkpoints? diff gpt_sotu experiments/mine",
    "check": "does each experiment differ from its parent in what it declares, and in nothing else? check",
    "tree": "show which experiment was forked from which, what each changes, and its best result",
    "verify": "does the layout change an experiment? verify experiments/gpt_sotu",
    "data": "which documents did a step train on? what is in a token store? data RUN --step N, data PREFIX",
    "inspect": "show what a run or a checkpoint contains, and check its files: inspect RUN --check",
    "replay": "run one step again and find where it is not finite: replay RUN --step N",
    "supervise": "launch an experiment, again after a crash: supervise experiments/gpt_sotu",
    "cluster": "print the job script for several nodes: cluster experiments/gpt_sotu --slurm --nodes 4 --gpus 8",
    "sweep": "train each combination of a grid with several seeds: sweep experiments/gpt_sotu --seeds 3 --grid optimizer.lr=1e-3,3e-4",
    "torture": "does a run survive kills? torture experiments/gpt_sotu --trials 50",
}


class _ParagraphFormatter(argparse.HelpFormatter):
    """Wraps each paragraph by itself to the terminal's width. A paragraph with an indented line stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.rstrip().split("\n\n")
        return "\n\n".join(
            part if "\n  " in part else super(_ParagraphFormatter, self)._fill_text(part, width, indent) for part in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are Mistakes; the one for an unknown option names the nearest known option."""

    def __init__(self, verb: str, description: str, examples: str = ""):
        """`examples` are shown below the options, line by line as they are."""
        super().__init__(
            prog=f"python -m research {verb}",
            description=description,
            epilog=examples,
            formatter_class=_ParagraphFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):
        """The parsed arguments. Option names may contain dashes instead of underscores: --max-new-tokens=5."""
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        words = []
        for word in args or ():
            name, equals, value = word.partition("=")
            option = "--" + name.removeprefix("--").replace("-", "_")
            words.append(option + equals + value if name.startswith("--") and option in options else word)
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise Mistake(f"{self.prog} does not know {unknown[0]}{suggestion(unknown[0].split('=')[0], options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message as a Mistake."""
        raise Mistake(f"{self.prog}: {message} → see {self.prog} --help")


def count(text: str) -> int:
    """A whole number from 1, as argparse's `type`: argparse reports anything else with the option's name."""
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1")
    return int(text)


def suggestion(word: str, words: Iterable[str]) -> str:
    """' → did you mean X?' for the closest of `words`, or ' → use one of …' if none is close."""
    words = list(words)
    near = nearest(word, words)
    return f" → did you mean {near}?" if near else f" → use {', '.join(words)}"
