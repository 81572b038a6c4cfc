"""The task translation[:FILE]: sentences that a model translates, compared with those of people by sacrebleu's BLEU and chrF.

The same figures are computed of three baselines: the source as it is, a word dictionary learned from the run's own training pairs
(word_dictionary.py), and the model with its initial weights. Imports no torch until it is evaluated.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.encoder_config import T5, AnyModel
from parallel.errors import Mistake
from parallel.files import published, user_path
from research.config import Experiment, Pairs
from research.data import documents, prepare
from research.data.pair_inputs import separator_of
from research.data.pair_text import EXAMPLE, Pair
from research.data.pairs import pairs_of
from research.data.sources import training_texts
from research.data.text_stores import joined
from research.evaluation.examples import check_file
from research.evaluation.results import FOLDER
from research.evaluation.task import Metric, Settings, ShowProgress, TaskContext, TextRequest
from research.evaluation.word_dictionary import WordDictionary
from research.tracking import run_folder

if TYPE_CHECKING:
    from research.evaluation.session import Session

NAME, PACKAGE = "translation", "sacrebleu"
BUILTIN = f"{documents.BUILTIN}libreoffice_help_en_de/test"
SUFFIXES = tuple(f".jsonl{end}" for end in ("", ".gz", ".xz", ".zst"))
TRANSLATIONS = "translations"
"""The folder of a run's evaluations that keeps what was written."""
MODEL, COPY, DICTIONARY, UNTRAINED = "model", "copy", "dictionary", "untrained"
MOST_LEARNED = 100_000
"""The most training pairs that the dictionary is learned from."""
MORE = 16
"""Tokens that a translation may have beside twice as many as its source."""


@dataclass(frozen=True)
class Translation:
    """BLEU and chrF on a file of pairs, of which each source is translated alone."""

    name: str
    text: str
    """builtin:NAME/SPLIT, or the path of a file."""
    options: Settings
    beams: int
    """The beams of the search for a translation; 1: always the likeliest token."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the metrics, including sacrebleu's signatures."""
        return {"limit": self.options.limit, "beams": self.beams, PACKAGE: "; ".join(signatures())}

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the pairs, and of the training texts, from which the dictionary is learned; in hexadecimal."""
        digests = (prepare.digest(context.data, text, context.root) for text in training_names(context))
        return joined(documents.digest(self.text, self.options.root), *digests)

    def pairs(self) -> list[Pair]:
        """The pairs that are translated. A Mistake that names the line if the file holds something else."""
        found = []
        for number, one in enumerate(islice(documents.documents_and_pairs(self.text, self.options.root), self.options.limit), start=1):
            if not isinstance(one, Pair):
                raise Mistake(f"{self.name}: document {number} of {self.text} is no pair → write one object a line: {EXAMPLE}")
            found.append(one)
        return found

    def evaluate(self, session: "Session", context: TaskContext, progress: ShowProgress) -> tuple[list[Metric], int]:
        """Translates, keeps the translations, and returns (metrics, number of pairs)."""
        pairs = self.pairs()
        requests = [request_of(pair, session.model, context) for pair in pairs]
        with progress(f"{self.name}: the dictionary"):
            dictionary = WordDictionary(training_pairs(context))
        texts = {COPY: [pair.source for pair in pairs], DICTIONARY: [dictionary.translated(pair.source) for pair in pairs]}
        with progress(f"{self.name}: the untrained model", len(pairs)) as advance, session.untrained() as untrained:
            texts[UNTRAINED] = untrained.texts([request for request, _ in requests], advance)
        with progress(self.name, len(pairs)) as advance:
            found = session.texts([request for request, _ in requests], advance, self.beams)
        texts = {MODEL: found, **texts}
        self._keep(session, pairs, texts)
        metrics = [metric for who, written in texts.items() for metric in metrics_of(who, written, [pair.target for pair in pairs])]
        return [*metrics, Metric("sources_cut", float(sum(is_cut for _, is_cut in requests)), None)], len(pairs)

    def _keep(self, session: "Session", pairs: Sequence[Pair], texts: dict[str, list[str]]) -> None:
        """A line of JSON for each pair, with what each has written."""
        folder = session.run / FOLDER / TRANSLATIONS
        for place in (folder.parent, folder):
            run_folder.refuse_link(place)
        folder.mkdir(parents=True, exist_ok=True)
        with published(folder / self.file_name(session)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for i, pair in enumerate(pairs):
                row = {"source": pair.source, "reference": pair.target} | {who: written[i] for who, written in texts.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def file_name(self, session: "Session") -> str:
        """step_001400-test-beams4.jsonl."""
        assert session.checkpoint is not None
        return f"{session.checkpoint.name}-{Path(self.text).name.partition('.')[0]}-beams{self.beams}.jsonl"


def is_name(name: str) -> bool:
    """Whether a task's name is this file's."""
    task, colon, file = name.partition(":")
    return task == NAME and bool(file or not colon)


def create_task(name: str, settings: Settings, beams: int | None, experiment: Experiment) -> Translation:
    """The task of this name, with or without :FILE. Checks that its file exists but does not read it."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise Mistake(f"{name} needs {PACKAGE}, which is not installed → pip install -r requirements-eval.txt")
    if beams is not None and beams < 1:
        raise Mistake(f"--beams {beams} does not work → use 1 or more")
    if not isinstance(experiment.data.examples, Pairs):
        raise Mistake(f"{name} needs a run that was trained on pairs, with data.examples = Pairs() → train one, or use another task")
    file = name.partition(":")[2]
    text = str(check_file(user_path(settings.root, file), name, SUFFIXES)) if file else BUILTIN
    return Translation(name, text, settings, 1 if beams is None else beams)


def request_of(pair: Pair, model: AnyModel, context: TaskContext) -> tuple[TextRequest, bool]:
    """What the model is given to translate a source, and whether the source had to be cut at its end.

    Both kinds of models read the source and the separator. A decoder-only model writes behind them, within model.seq_length, of which at
    least half is left for what it writes. An encoder–decoder has a length of its own for each side.
    """
    assert context.separator is not None
    ids, separator = context.tokenizer.encode(pair.source), separator_of(context.tokenizer, context.separator)
    longest = model.source_length if isinstance(model, T5) else model.seq_length // 2
    kept = ids[: longest - 1]
    room = model.seq_length if isinstance(model, T5) else model.seq_length - len(kept) - 1
    tokens = min(2 * len(kept) + MORE, room)
    return TextRequest((*kept, separator), tokens, (context.tokenizer.end_of_text, separator)), len(kept) < len(ids)


def training_names(context: TaskContext) -> list[str]:
    """The names of the training texts, each of a file, a folder, a built-in text or a store."""
    return [name for text in training_texts(context.data.train).values() for name in documents.each(text)]


def training_pairs(context: TaskContext) -> list[tuple[str, str]]:
    """(source, target) of the first MOST_LEARNED pairs that the run was trained on, from its token stores."""
    assert context.separator is not None
    found: list[tuple[str, str]] = []
    for text in training_names(context):
        for store in prepare.held_out_stores(context.data, text, context.root, context.tokenizer, context.progress, counts_bytes=False):
            for begin, middle, end in zip(*pairs_of(store, context.tokenizer, context.separator), strict=True):
                if len(found) == MOST_LEARNED:
                    return found
                sides = store.tokens[begin:middle], store.tokens[middle + 1 : end - 1]
                found.append((context.tokenizer.decode(sides[0]), context.tokenizer.decode(sides[1])))
    return found


def metrics_of(who: str, texts: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """bleu and chrf of what the model has written, and copy/bleu and so on of a baseline. Both are of 0 to 100."""
    prefix = "" if who == MODEL else f"{who}/"
    names = ("bleu", "chrf")
    return [
        Metric(f"{prefix}{name}", float(metric.corpus_score(texts, [references]).score), None, higher_is_better=True)
        for name, metric in zip(names, _sacrebleu(), strict=True)
    ]


def signatures() -> list[str]:
    """sacrebleu's signatures of both metrics, which say how they are computed: 'BLEU nrefs:1|case:mixed|…'."""
    found = []
    for metric in _sacrebleu():
        score = metric.corpus_score(["a"], [["a"]])
        found.append(f"{score.name} {metric.get_signature()}")
    return found


def _sacrebleu() -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(), CHRF()
