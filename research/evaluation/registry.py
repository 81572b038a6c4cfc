"""The tasks by name: `--tasks` of `python -m research evaluate`, and of an evaluation in the middle of training."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from parallel.errors import Mistake
from research.data import documents
from research.evaluation import examples
from research.evaluation.lambada import Lambada
from research.evaluation.minimal_pairs import MinimalPairs
from research.evaluation.multiple_choice import MultipleChoice
from research.evaluation.perplexity import Perplexity
from research.evaluation.task import Settings, Task
from research.evaluation.wikitext import WholeWikitext, Wikitext

VALIDATION = "validation"
BUILTIN = Path(__file__).parent / "builtin"


class Kind(NamedTuple):
    """How tasks of one kind are made: from the user's file, or from one that we know the place of."""

    what: str
    make: Callable[[str, Settings, Path], Task]
    suffixes: tuple[str, ...]
    builtin: Path | None = None
    """A file that ships with Tessera."""
    at: str = ""
    """Where in --data FOLDER the file lies, and"""
    get: str = ""
    """how to come by it."""


WIKITEXT_2 = "get WikiText-2 (Hugging Face data set Salesforce/wikitext, wikitext-2-raw-v1) as one text file"
LAMBADA = (
    'get LAMBADA\'s test split as OpenAI has used it (Hugging Face data set EleutherAI/lambada_openai), a line {"text": "…"} a passage'
)
KINDS: dict[str, Kind] = {
    "agreement": Kind(
        "subject and verb, determiner and noun, reflexives: minimal pairs of ours", MinimalPairs, (".jsonl",), BUILTIN / "agreement.jsonl"
    ),
    "government": Kind(
        "who does what in the United States: multiple choice of ours", MultipleChoice, (".jsonl",), BUILTIN / "government.jsonl"
    ),
    "wikitext": Kind(
        "WikiText-2's test split: perplexity a word, as lm_eval's wikitext",
        Wikitext,
        (".txt", ".raw", ".tokens"),
        at="wikitext2/test.txt",
        get=WIKITEXT_2,
    ),
    "wikitext_megatron": Kind(
        "the same, as Megatron-LM's WIKITEXT103", WholeWikitext, (".txt", ".raw", ".tokens"), at="wikitext2/test.txt", get=WIKITEXT_2
    ),
    "lambada": Kind("LAMBADA's last words, as lm_eval's lambada_openai", Lambada, (".jsonl",), at="lambada/test.jsonl", get=LAMBADA),
    "pairs": Kind("minimal pairs, BLiMP's format: sentence_good, sentence_bad, UID", MinimalPairs, (".jsonl",)),
    "choice": Kind("multiple choice: query, choices, gold", MultipleChoice, (".jsonl",)),
}
TEXT = "perplexity"


def named(names: Sequence[str], settings: Settings | None = None) -> list[Task]:
    """The tasks, each once, in order. A Mistake where a name is not known or a file is not there; nothing is read."""
    return [_named(name, settings or Settings()) for name in dict.fromkeys(names)]


def described() -> list[tuple[str, str]]:
    """(what to write, what it is) of every task there is."""
    found = [
        (VALIDATION, "the run's own validation split: loss, perplexity, bits per byte"),
        (f"{TEXT}:FILE", "the same of a .txt or .jsonl file"),
    ]
    for name, kind in KINDS.items():
        found.append((name if kind.builtin or kind.at else f"{name}:FILE", kind.what))
    return found


def _named(name: str, settings: Settings) -> Task:
    kind, colon, place = name.partition(":")
    if name == VALIDATION:
        return Perplexity(name, settings)
    if kind == TEXT and place:
        documents.check_exists(place, settings.root, name)
        return Perplexity(name, settings, place)
    if kind not in KINDS or (colon and not place):
        raise Mistake(f"there is no task {name!r}{_nearest(kind)}")
    known = KINDS[kind]
    path = settings.root / Path(place).expanduser() if place else known.builtin or _at_hand(name, known, settings)
    return known.make(name, settings, examples.exists(path, name, known.suffixes))


def _at_hand(name: str, kind: Kind, settings: Settings) -> Path:
    """The file in --data FOLDER."""
    if not kind.at:
        raise Mistake(f"task {name!r} needs a file → write {name}:FILE{' or '.join(kind.suffixes)}")
    if settings.data is None:
        ways = f"{kind.get}, then write {name}:FILE or --data FOLDER with {kind.at} in it"
        raise Mistake(f"task {name!r} needs a file that does not come with Tessera → {ways}")
    path = settings.root / settings.data / kind.at
    if not path.is_file():
        raise Mistake(f"task {name!r}: {path} does not exist → {kind.get}, put it there or write {name}:FILE")
    return path


def _nearest(kind: str) -> str:
    names = [VALIDATION, TEXT, *KINDS]
    close = difflib.get_close_matches(kind, names, n=1, cutoff=0.5)
    return f" → did you mean {close[0]}?" if close else f" → use {', '.join(names)} (--tasks list)"
