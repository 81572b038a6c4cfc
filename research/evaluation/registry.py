"""The evaluation tasks by name: what `--tasks` of `python -m research evaluate` and `evaluate.tasks` of an experiment may name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from parallel.errors import Mistake, nearest
from parallel.files import user_path
from research.data import python_stdlib
from research.data.prepare import check_text
from research.evaluation import examples
from research.evaluation.function_bodies import FunctionBodies
from research.evaluation.infilling import Infilling
from research.evaluation.lambada import Lambada
from research.evaluation.minimal_pairs import MinimalPairs
from research.evaluation.multiple_choice import MultipleChoice
from research.evaluation.perplexity import Perplexity
from research.evaluation.task import Settings, Task, TextTask
from research.evaluation.wikitext import WholeWikitext, Wikitext

VALIDATION = "validation"
TEXT = "perplexity"
BUILTIN = Path(__file__).parent / "builtin"


class TaskKind(NamedTuple):
    """A kind of task on a file: the user's own, one that ships with Tessera, or one from `--data FOLDER`."""

    description: str
    task: Callable[[str, Settings, Path], Task | TextTask]
    """The task's class."""
    suffixes: tuple[str, ...]
    builtin: Path | None = None
    """The file that ships with Tessera, or the folder of Python's library."""
    data_path: str = ""
    """The file's path in `--data FOLDER`."""
    download: str = ""
    """How to get that file; the beginning of a sentence."""


WIKITEXT_2 = "get WikiText-2 (Hugging Face data set Salesforce/wikitext, wikitext-2-raw-v1) as one text file"
LAMBADA = (
    'get LAMBADA\'s test split as OpenAI has used it (Hugging Face data set EleutherAI/lambada_openai), a line {"text": "…"} a passage'
)
KINDS: dict[str, TaskKind] = {
    "agreement": TaskKind(
        "subject and verb, determiner and noun, reflexives: minimal pairs of ours", MinimalPairs, (".jsonl",), BUILTIN / "agreement.jsonl"
    ),
    "government": TaskKind(
        "who does what in the United States: multiple choice of ours", MultipleChoice, (".jsonl",), BUILTIN / "government.jsonl"
    ),
    "wikitext": TaskKind(
        "WikiText-2's test split: perplexity a word, as lm_eval's wikitext",
        Wikitext,
        (".txt", ".raw", ".tokens"),
        data_path="wikitext2/test.txt",
        download=WIKITEXT_2,
    ),
    "wikitext_megatron": TaskKind(
        "the same, as Megatron-LM's WIKITEXT103",
        WholeWikitext,
        (".txt", ".raw", ".tokens"),
        data_path="wikitext2/test.txt",
        download=WIKITEXT_2,
    ),
    "lambada": TaskKind(
        "LAMBADA's last words, as lm_eval's lambada_openai", Lambada, (".jsonl",), data_path="lambada/test.jsonl", download=LAMBADA
    ),
    "pairs": TaskKind("minimal pairs, BLiMP's format: sentence_good, sentence_bad, UID", MinimalPairs, (".jsonl",)),
    "choice": TaskKind("multiple choice: query, choices, gold", MultipleChoice, (".jsonl",)),
    "python_bodies": TaskKind(
        "one-line function bodies of Python's library that code_stdlib does not train on: filling in",
        FunctionBodies,
        (".py",),
        python_stdlib.root(),
    ),
    "fim": TaskKind("filling in: prefix, suffix, middle; a run without FIM sees the prefix alone", Infilling, (".jsonl",)),
}


def create_tasks(names: Sequence[str], settings: Settings | None = None, others: Sequence[str] = ()) -> list[Task | TextTask]:
    """The tasks of these names in order, without duplicates. `others`: names of tasks elsewhere, which a mistyped name may mean.

    Raises a Mistake if a name is not known or a file does not exist; reads no file.
    """
    settings = settings or Settings()
    tasks: list[Task | TextTask] = []
    for name in dict.fromkeys(names):
        kind_name, colon, file = name.partition(":")
        if name == VALIDATION:
            tasks.append(Perplexity(name, settings))
        elif kind_name == TEXT and file:
            check_text(file, settings.root, name)
            tasks.append(Perplexity(name, settings, file))
        elif kind_name in KINDS and (file or not colon):
            kind = KINDS[kind_name]
            if file:
                path = examples.check_file(user_path(settings.root, file), name, kind.suffixes)
            else:
                path = kind.builtin or _path_in_data_folder(name, kind, settings)
            tasks.append(kind.task(name, settings, path))
        else:
            known = [VALIDATION, TEXT, *KINDS]
            near = nearest(kind_name, [*known, *others])
            way_out = f"did you mean {near}?" if near else f"use {', '.join(known)} (--tasks list)"
            raise Mistake(f"there is no task {name!r} → {way_out}")
    return tasks


def _path_in_data_folder(name: str, kind: TaskKind, settings: Settings) -> Path:
    """The task's file in `--data FOLDER`; a Mistake that says where to get it if it is not there."""
    if not kind.data_path:
        raise Mistake(f"task {name!r} needs a file → write {name}:FILE{' or '.join(kind.suffixes)}")
    if settings.data is None:
        ways = f"{kind.download}, then write {name}:FILE or --data FOLDER with {kind.data_path} in it"
        raise Mistake(f"task {name!r} needs a file that does not come with Tessera → {ways}")
    path = settings.root / settings.data / kind.data_path
    if not path.is_file():
        raise Mistake(f"task {name!r}: {path} does not exist → {kind.download}, put it there or write {name}:FILE")
    return path


def descriptions() -> list[tuple[str, str]]:
    """(how to name it, what it is) for every task."""
    return [
        (VALIDATION, "the run's own validation split: loss, perplexity, bits per byte"),
        (f"{TEXT}:FILE", "the same of a .txt or .jsonl file"),
        *((name if kind.builtin or kind.data_path else f"{name}:FILE", kind.description) for name, kind in KINDS.items()),
    ]
