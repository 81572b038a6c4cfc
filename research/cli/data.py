"""`python -m research data RUN --step N`: which documents a step trained on. `data PREFIX` describes a token store. Imports no torch.

What a store's description consists of is in research/cli/store_description.py.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from parallel.checkpoint.damage import read_manifest
from parallel.checkpoint.folder import newest_complete
from parallel.errors import Mistake
from parallel.files import user_path
from research import ROOT
from research.cli import store_description
from research.cli.json_output import add_json_option, only_json_on_stdout, print_json
from research.cli.trained_run import add_trust_option, find_run, say, settings_of_run
from research.cli.verbs import Parser, count
from research.config import examples
from research.config.experiment_folder import load_variants, variant_names
from research.config.sources import describe_texts
from research.data import inspection, order, prepare
from research.data.batches import Window
from research.data.megatron_index import file_of
from research.data.prepare import Corpus
from research.data.stores import STORE
from research.tracking import format as fmt
from research.tracking import metrics, run_folder, run_record
from research.tracking.console import Console
from research.tracking.run_folder import IMPORTED, RunFolder
from research.training.sampler import sampler_of

SAMPLES, SAMPLES_AS_JSON, CHARACTERS = 64, 1 << 16, 200
"""The most samples that are printed unless --samples says otherwise, and the most characters of a text."""
LONGEST_SOURCE, SHORTEST_TEXT, GAP = 24, 16, "  "
STORE_FILES = (".idx", ".bin", ".json")
WHAT = """\
Prints which documents a step of a run trained on, or describes a token store.

RUN --step N: each sample of the step, whatever layout the run had, and each
document that the sample touches: its number, where in the document the sample
begins and how many of the document's tokens it has, and their first words. A
sample is a window of model.seq_length + 1 tokens, or, in the first steps of a
schedule.length_ramp, its beginning; the last token is predicted only. Steps
and epochs are counted from 1, everything else from 0. The run may still be
running, and needs no checkpoint; with one, its text is compared with what was
trained on. Nothing of the run is changed or locked.

PREFIX: the documents, tokens, bytes of text, ids, source and tokenizer of the
store in PREFIX.bin, PREFIX.idx and PREFIX.json, and how long its documents are.
Any of the three files, or store:PREFIX, names it too.

With --step, the first word names a run; without, a store.
"""
EXAMPLES = """\
examples:
  python -m research data gpt_sotu --step 12
  python -m research data runs/gpt_sotu/latest --step 12 --samples 3 --json
  python -m research data corpora/mine/train --texts 5 --plot lengths.png
"""


def main(argv: list[str]) -> None:
    """Prints the documents of a step, or the description of a store."""
    arguments = _parser().parse_args(argv)
    of_run, of_store = ("samples", "trust"), ("plot", "texts", "tokenizer")
    is_run = arguments.step is not None
    for name in of_store if is_run else of_run:
        if getattr(arguments, name):
            kind, other = ("a token store", "leave it or --step out") if is_run else ("a step of a run", "add --step N")
            raise Mistake(f"--{name} is for {kind} → {other}")
    prefix, run = find_prefix(arguments.what), find_run_or_none(arguments.what)
    if prefix is not None and run is not None:
        choice = f"the run {run.title} (without --step: the store)" if is_run else f"the store (with --step: the run {run.title})"
        Console(sys.stderr).warn(f"{arguments.what} is a token store, {file_of(prefix, '.idx')}, and a run: this is {choice}")

    with only_json_on_stdout(arguments.json):
        if not is_run:
            if prefix is None:
                raise no_store(arguments.what, run)
            shown = store_description.describe(prefix, arguments.texts, arguments.tokenizer, arguments.plot)
        elif prefix is not None and run is None:
            raise Mistake(f"{arguments.what} is a token store, which has no steps → leave --step out, or name a run")
        else:
            shown = documents_of_step(arguments)
    if arguments.json:
        print_json(shown)


def _parser() -> Parser:
    parser = Parser("data", WHAT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("what", metavar="RUN|PREFIX", help="a run's folder, name or title; or a token store")
    of_run = parser.add_argument_group("a step of a run")
    of_run.add_argument("--step", type=int, metavar="N", help="the step, counted from 1 as in the run's rows")
    of_run.add_argument(
        "--samples", type=count, metavar="K", help=f"print the first K samples (default: {SAMPLES}; with --json: {SAMPLES_AS_JSON:,})"
    )
    of_store = parser.add_argument_group("a token store")
    of_store.add_argument("--texts", type=count, metavar="K", help=f"the first {CHARACTERS} characters of K documents, evenly spaced")
    of_store.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="decodes the texts: builtin:gpt2 or a tokenizer.json (default: the one beside the store, or the built-in one of PREFIX.json)",
    )
    of_store.add_argument("--plot", type=Path, metavar="FILE", help="draw the lengths of the documents: FILE.png or FILE.svg")
    add_trust_option(parser)
    add_json_option(parser, "the samples and their documents, or the description,")
    return parser


def find_prefix(what: str) -> Path | None:
    """The PREFIX of the token store that `what` names, by the PREFIX or one of its files; None if there is no such .idx or .bin."""
    with contextlib.suppress(OSError, RuntimeError):  # no file can have such a name, or nobody such a home
        path = user_path(Path(), what.removeprefix(STORE))
        for prefix in [path, *([path.with_suffix("")] if path.suffix in STORE_FILES else [])]:
            if file_of(prefix, ".idx").is_file() or file_of(prefix, ".bin").is_file():
                return prefix
    return None


def find_run_or_none(what: str) -> RunFolder | None:
    """The run that `what` names, if it names one."""
    with contextlib.suppress(Mistake):
        return run_folder.find(what)
    return None


def no_store(what: str, run: RunFolder | None) -> Mistake:
    """What is wrong with a command without --step whose first word names no store."""
    if run is not None:
        return Mistake(f"{what} is the run {run.title}, not a token store → add --step N for the documents of one of its steps")
    name = what.removeprefix(STORE)
    return Mistake(
        f"{what:.200} is neither a run nor a token store: there is no {name:.200}.idx → name what stands before .idx and .bin, or a run "
        "and --step N"
    )


# A step of a run


def documents_of_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the documents of the step, and returns them as JSON data. A Mistake if the run has no such step, or another text now."""
    console, step = Console(), arguments.step
    folder = find_run(arguments.what)
    if run_record.read(folder)["status"] == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it has no steps → name a run that has trained")
    experiment = settings_of_run(arguments, folder, ["train", "validation"])
    steps = experiment.schedule.steps
    if not 1 <= step <= steps:
        raise Mistake(f"--step {step} is not one of the {steps} steps of {folder.title} → use 1 to {steps}")
    if step * experiment.schedule.batch_size > order.LARGEST:
        size = f"schedule.batch_size = {experiment.schedule.batch_size:.6g}"
        raise Mistake(f"{folder.config}: {size} is not what a run trains with → restore the file")
    corpus = prepare.load(experiment.data, ROOT, experiment.model.vocab_size, say)
    checkpoint = compared_checkpoint(folder, corpus)
    logged = metrics.last(folder.metrics, ["progress/step"]).get("progress/step")
    logged = logged if isinstance(logged, int) else 0

    variants = load_variants(folder.source, experiment) if examples.EXAMPLES in variant_names(experiment) else {}  # which imports torch
    sampler = sampler_of(experiment, corpus, variants)
    numbers = sampler.samples(step - 1)
    shown = numbers[: arguments.samples or (SAMPLES_AS_JSON if arguments.json else SAMPLES)]
    samples = [sample_as_json(window, corpus) for number in shown for window in sampler.windows(number)]
    left_out = len(numbers) - len(shown)

    first = sampler.windows(numbers[0])[0]
    form = experiment.data.examples
    kind = f"of {first.stop - first.start - 1} + 1 tokens each" if form == examples.STREAM else f"· {examples.describe_examples(form)}"
    console.header([("", f"{folder.title} · step {step} of {steps} · samples {numbers[0]:,}–{numbers[-1]:,} {kind}")])
    console.header([("data", f"{describe_texts(experiment.data.train)} · {corpus.tokenizer.name} · {said_of_text(checkpoint)}")])
    if step > logged:
        newest = f"the last row is of step {logged}" if logged else "there is no row yet"
        console.warn(f"step {step} is not in {folder.metrics.name}, {newest}: this is what it reads once it is trained", in_header=True)
    console.lines(table(samples, console.width))
    if left_out:
        console.lines([f"and {left_out:,} more: --samples {len(numbers)} prints all"])
    return {
        **{"run": folder.title, "folder": str(folder.path), "step": step, "steps": steps, "last_logged_step": logged},
        **{"compared_with": checkpoint, "samples": samples, "samples_left_out": left_out},
    }


def compared_checkpoint(folder: RunFolder, corpus: Corpus) -> str | None:
    """The name of the newest checkpoint, if it says that this is the text it was trained on; None if it, or no checkpoint, tells.

    A Mistake if it says that it was another text.
    """
    checkpoint, then = newest_complete(folder.checkpoints), None
    if checkpoint is not None:
        with contextlib.suppress(Mistake):  # its manifest is damaged, or of another version
            then = read_manifest(checkpoint).facts.get("data")
    if checkpoint is None or then is None:
        return None
    if then != corpus.fingerprint:
        raise Mistake(
            f"the text or the tokenizer is not what {folder.title} was trained on: {checkpoint.name} has the fingerprint "
            f"{str(then)[:16]}, today's files have {corpus.fingerprint[:16]} → put the old files back"
        )
    return checkpoint.name


def said_of_text(checkpoint: str | None) -> str:
    """How sure it is that the text is the one that was trained on."""
    if checkpoint is None:
        return "no checkpoint tells whether the text is still the same"
    return f"the same text as in {checkpoint}"


def sample_as_json(window: Window, corpus: Corpus) -> dict[str, Any]:
    """One sample with the documents that it touches. Epochs are counted from 1."""
    facts = window.store.facts
    documents = [
        {
            "source": facts.get("source"),
            "document": facts.get("first_document", 0) + extract.document,
            "offset": extract.offset,
            "tokens": extract.tokens,
            "text": inspection.beginning(window.store, extract, corpus.tokenizer, CHARACTERS),
        }
        for extract in inspection.extracts(window.store, window.start, window.stop)
    ]
    return {"sample": window.sample, "epoch": window.epoch + 1, "window": window.number, "documents": documents}


def table(samples: Sequence[dict[str, Any]], width: int) -> Iterator[str]:
    """One line for each document of each sample, cut to `width` columns. There is a column of sources if there is more than one."""
    rows = [["sample", "epoch", "window", "document", "offset", "tokens"]]
    sources, texts = ["source"], ["text"]
    for sample in samples:
        own = [f"{sample[name]}" for name in ("sample", "epoch", "window")]
        for document in sample["documents"]:
            rows.append([*own, *(f"{document[name]}" for name in ("document", "offset", "tokens"))])
            sources.append(fmt.one_line(str(document["source"]), None)[-LONGEST_SOURCE:])
            texts.append(fmt.one_line(document["text"]) or "(end of text)")
            own = [""] * len(own)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names = max(map(len, sources)) if len(set(sources)) > 2 else 0
    for row, source, text in zip(rows, sources, texts, strict=True):
        cells = [f"{cell:>{size}}" for cell, size in zip(row, widths, strict=True)]
        cells += [f"{source:<{names}}"] * bool(names)
        start = GAP.join([*cells, ""])
        line = Text(start + text)
        line.truncate(max(width, len(start) + SHORTEST_TEXT), overflow="ellipsis")
        yield line.plain.rstrip()
