"""`python -m research prepare INPUT… --as NAME`: turns text into a corpus to train on, corpora/NAME, with its tokenizer."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import user_path
from parallel.regular_files import read_regular
from parallel.text import read_text
from research import ROOT
from research.cli.verbs import Parser, count
from research.cluster.environment import environment
from research.cluster.limited_process import SINGLE
from research.data import corpus, corpus_work, documents, random_split, special_tokens, tokenizer, tokenizer_file, tokenizer_ranks
from research.data.conversations import Form, PlainForm
from research.data.corpus import Options, Prepared
from research.data.corpus_inputs import Inputs
from research.data.example_inputs import ExampleInputs
from research.data.mask_store import MASK_SUM
from research.data.pair_inputs import WITH_SEPARATOR, PairForm, PairInputs, separator_of
from research.data.special_tokens import SEPARATOR
from research.data.text_files import INSTALL, KINDS, Reading
from research.data.tokenizer_file import CONFIG, FILE, LARGEST, TEMPLATE
from research.tracking import format as fmt
from research.tracking.console import Console

FOLDER = "corpora"
TOKENIZER = "builtin:bpe-8192"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
DESCRIPTION = f"""Turns your own text into token stores for training and the tokenizer beside
them, in {FOLDER}/NAME of this checkout. Prints the lines for an experiment."""
DETAILS = f"""what is read:
  .txt, .md, and files of any other name that are text: one document each
  .jsonl     one JSON object a line and a document, its text under --key
  .parquet   one row a document, its text in the column --key
  the first two also as .gz, .xz, .zst
  folders of these, such as a tree of code: sorted by path; hidden and binary
  files are left out and counted
  with --supervised: .jsonl only, one example a line, either of
    {{"messages": [{{"role": "user", "content": "…"}}, …]}}
    {{"prompt": "…", "response": "…"}}
  with --pairs: .jsonl only, one pair a line
    {{"source": "a sentence", "target": "ein Satz"}}
  or two files of plain text whose lines are translations: train.en train.de
.parquet and .zst need {INSTALL}

tokenizers:
  builtin:bpe-8192   byte-level BPE of 8,192 tokens (any number from 257),
                     trained on the text
  builtin:gpt2       GPT-2's 50,257 tokens
  builtin:bytes      257 tokens: the 256 bytes and end-of-text
  builtin:chars      the characters of the text and end-of-text
  +fim +spans +mask +sep
                     behind one of these names: special tokens in addition,
                     such as builtin:bpe-8192+fim
  PATH               a tokenizer.json, a transformers folder that holds one, or
                     tiktoken's ranks (.tiktoken)

Memory does not grow with the text. If the work is ended at any moment, the same
command continues it. The result does not depend on --workers.

examples:
  python -m research prepare book.txt --as book --tokenizer builtin:bpe-1024
  python -m research prepare notes/ more.jsonl.gz --as mine --split 90,10
  python -m research prepare src/ --as code --tokenizer builtin:bytes
  python -m research prepare chats.jsonl --as chats --supervised
      --tokenizer runs/smollm2/ID/tokenizer
  python -m research prepare train.en train.de --as en_de --pairs"""
LENGTH = 2**31 - 1
"""model_max_length in tokenizer_config.json: the corpus does not limit it."""
MOST_PER_CORE = 4
"""The most processes per core: each takes a hundred megabytes."""
PLAIN = "plain"
"""What --template names for no chat template."""
TEMPLATE_SECONDS = 20.0
"""The most time that a chat template may take for the messages of one example."""
WAY_OUT = "do not use it, or name another one: --tokenizer builtin:bpe-8192"


def main(argv: list[str]) -> None:
    """Prepares the corpus and prints what it holds."""
    arguments = parsed(argv)
    console, target = Console(), arguments.corpora / arguments.name
    random_split.shares_of(arguments.split)
    write_tokenizer, tokenizer_sha256 = chosen_tokenizer(arguments.tokenizer)
    options = Options(arguments.tokenizer, tokenizer_sha256, arguments.split, arguments.seed)
    with contextlib.ExitStack() as stack:
        reading = Reading(arguments.key, arguments.invalid == "replace")
        if arguments.supervised:
            form = stack.enter_context(form_of(arguments.template, write_tokenizer))
            inputs: Inputs = ExampleInputs(arguments.inputs, Path.cwd(), reading, form)
        elif arguments.pairs:
            refuse_missing_separator(arguments.separator, arguments.tokenizer, write_tokenizer)
            inputs = PairInputs(arguments.inputs, Path.cwd(), reading, PairForm(arguments.separator))
        else:
            inputs = Inputs(arguments.inputs, Path.cwd(), reading)
        make(arguments, inputs, options, write_tokenizer, target, console)


def make(
    arguments: argparse.Namespace,
    inputs: Inputs,
    options: Options,
    write_tokenizer: Callable[[Path], None] | None,
    target: Path,
    console: Console,
) -> None:
    """Prepares the corpus of these inputs in `target`, and reports."""
    if inside := next((file for file in inputs.files if target.resolve() in file.path.resolve().parents), None):
        raise Mistake(f"{inside.path} lies in {target}, the folder that is made → name another corpus with --as")
    with corpus_work.opened(target, arguments.replace) as work:
        console.header([("", f"prepare {shown(target)}"), ("input", f"{fmt.plural(len(inputs.files), 'file')}, {size(inputs.file_bytes)}")])
        if isinstance(inputs, PairInputs):
            console.header([("pairs", f"source {inputs.form.separator} target")])
        elif isinstance(inputs, ExampleInputs):
            console.header([("template", inputs.form.name)])
        if left := inputs.left.sentence():
            console.header([("left out", left)])
        try:
            with environment(SINGLE) if arguments.workers > 1 else contextlib.nullcontext():
                prepared = corpus.prepare(work, inputs, options, arguments.workers, write_tokenizer, console.progress, console.warn)
            work.publish(arguments.replace)
        except KeyboardInterrupt:
            Console(sys.stderr).warn(f"ended by Ctrl-C: {work.path} has what is finished, and {corpus_work.AGAIN}")
            raise
    report(prepared, target, console, examples_of(inputs))


def parsed(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("prepare", DESCRIPTION)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = DETAILS
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=f"a file ({', '.join(KINDS)}, …) or a folder")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help=f"the corpus to make: {FOLDER}/NAME")
    parser.add_argument("--tokenizer", help=f"see below (default: {TOKENIZER}, with --pairs {WITH_SEPARATOR})")
    parser.add_argument(
        "--split", default=random_split.EXAMPLE, metavar="SHARES", help="shares of train, val and test, by document (default: 98,1,1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the documents that are held out (default: 0)")
    parser.add_argument("--key", default="text", help="the key or column of the text (default: text)")
    parser.add_argument(
        "--invalid", choices=("error", "replace"), default="error", help="bytes that are not UTF-8: refused, or U+FFFD, and counted"
    )
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="processes that tokenize (default: 1, with a thread per core)"
    )
    parser.add_argument("--supervised", action="store_true", help="conversations: a mask beside each store says which tokens are responses")
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="a chat template in jinja, or 'plain' for none (default: that of the tokenizer if it has one, else plain)",
    )
    parser.add_argument("--pairs", action="store_true", help="sources and targets, such as sentences and their translations")
    parser.add_argument("--separator", default=SEPARATOR, metavar="TOKEN", help=f"the special token between them (default: {SEPARATOR})")
    parser.add_argument("--replace", action="store_true", help="replace a finished corpus of this name, with all in its folder")
    parser.add_argument("--corpora", help=f"the folder of corpora (default: {FOLDER}, in this checkout)")
    arguments = parser.parse_args(argv)
    if not NAME.fullmatch(arguments.name):
        raise Mistake(f"--as {arguments.name} is no name of a corpus → use letters, digits, dots, dashes and underscores: --as my_text")
    if arguments.workers > (most := MOST_PER_CORE * (os.cpu_count() or 1)):
        raise Mistake(f"--workers {arguments.workers} is more than {MOST_PER_CORE} per core, which saves no time → use at most {most}")
    if arguments.template and not arguments.supervised:
        raise Mistake(f"--template {arguments.template} is for conversations → add --supervised, or leave it out")
    if arguments.supervised and arguments.pairs:
        raise Mistake("--supervised and --pairs are two kinds of examples → use one of them")
    if arguments.separator != SEPARATOR and not arguments.pairs:
        raise Mistake(f"--separator {arguments.separator} is for pairs → add --pairs, or leave it out")
    if arguments.pairs and arguments.key != "text":
        raise Mistake(f"--key {arguments.key} is not for pairs, whose keys are source and target → leave it out")
    if arguments.tokenizer is None:
        arguments.tokenizer = WITH_SEPARATOR if arguments.pairs else TOKENIZER
    if arguments.supervised and arguments.key != "text":
        raise Mistake(f"--key {arguments.key} is not for conversations, whose keys are messages, or prompt and response → leave it out")
    arguments.corpora = ROOT / FOLDER if arguments.corpora is None else user_path(Path(), arguments.corpora)
    return arguments


def chosen_tokenizer(name: str) -> tuple[Callable[[Path], None] | None, str]:
    """(what writes its files into a folder, a hash of its own files) for a tokenizer that is not built in; (None, "") for one that is."""
    if name.startswith(documents.BUILTIN):
        try:
            tokenizer.declared_vocab_size(name)
        except Mistake as mistake:
            raise Mistake(str(mistake).replace("data.tokenizer", "--tokenizer")) from None
        return None, ""
    path = user_path(Path(), name)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        models = ", ".join(entry.name for entry in path.parent.glob("*.model")) if path.parent.is_dir() else ""
        instead = f" (there is {models}: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes one)" if models else ""
        raise Mistake(f"--tokenizer {name}: {path} does not exist{instead} → name a {FILE}, its folder, or a .tiktoken file")
    if path.name.endswith(tokenizer_ranks.SUFFIX):
        ranks = tokenizer_ranks.read(path)
        return functools.partial(write_ranks, ranks), hashlib.sha256(repr(ranks).encode()).hexdigest()
    if path.suffix != ".json":
        raise Mistake(f"--tokenizer {name} is not a kind of file that is known → name a {FILE}, its folder, or a .tiktoken file")

    # a stranger's: tried in a child process before it is used here
    from research.exchange.hf_tokenizer import copy_tokenizer
    from research.exchange.limited_tokenizer import try_tokenizer

    try_tokenizer(str(path), Path(), WAY_OUT)
    beside = [file for other in (FILE, CONFIG, TEMPLATE) if (file := path.with_name(other)).is_file()]
    digest = hashlib.sha256(b"\0".join(read_regular(file, LARGEST) for file in {path: 0} | dict.fromkeys(beside, 0)))

    def write(folder: Path) -> None:
        copy_tokenizer(path, folder, LENGTH, {})

    return write, digest.hexdigest()


def write_ranks(ranks: dict[bytes, int], folder: Path) -> None:
    """The files of a tokenizer made from tiktoken's ranks."""
    (folder / FILE).write_text(tokenizer_ranks.tokenizer_json(ranks), encoding="utf-8")
    corpus.write_config(folder)


@contextlib.contextmanager
def form_of(template: str | None, write_tokenizer: Callable[[Path], None] | None) -> Iterator[Form]:
    """How conversations become text: with the template that --template names, else with the tokenizer's own one, else without one."""
    with tempfile.TemporaryDirectory() as folder:  # what a run will find beside the tokenizer
        if write_tokenizer is None:
            corpus.write_config(Path(folder))
            own, special = None, {tokenizer.END_OF_TEXT}
        else:
            write_tokenizer(Path(folder))
            loaded = tokenizer_file.load(FILE, Path(folder))
            own = tokenizer_file.template_of(loaded, Path(folder))
            special = {token.content for token in loaded.backend.get_added_tokens_decoder().values() if token.special}
        variables = tokenizer_file.special_tokens_in(Path(folder))
    if template == PLAIN or (template is None and own is None):
        yield PlainForm()
        return
    name, source = ("the tokenizer's own", own) if template is None else (template, read_template(template))
    try:
        from research.generation.chat_template import TemplateRenderer
    except ModuleNotFoundError as error:
        raise Mistake(f"a chat template needs {error.name} → pip install -r requirements-serve.txt, or --template {PLAIN}") from None
    from research.generation.training_template import TrainingTemplate

    assert source is not None
    with contextlib.closing(TemplateRenderer(source, TEMPLATE_SECONDS)) as renderer:
        yield TrainingTemplate(source, name, renderer.render_each, special, variables)


def refuse_missing_separator(separator: str, name: str, write_tokenizer: Callable[[Path], None] | None) -> None:
    """Raises a Mistake if the tokenizer that --tokenizer names has no such special token. A built-in one need not be made for that."""
    if write_tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            separator_of(tokenizer_file.load(FILE, Path(folder)), separator)
    elif separator not in special_tokens.parted(name)[1]:
        raise Mistake(f"--pairs puts {separator} between source and target, which {name} does not have → use {WITH_SEPARATOR}")


def read_template(name: str) -> str:
    """The text of the file that --template names."""
    way_out = f"name a file of jinja text, or {PLAIN}"
    source = read_text(user_path(Path(), name), f"--template {name}", way_out)
    if not 0 < len(source) <= tokenizer_file.LONGEST_TEMPLATE:
        raise Mistake(f"--template {name} is empty, or longer than {tokenizer_file.LONGEST_TEMPLATE} characters → {way_out}")
    return source


def size(num_bytes: int) -> str:
    """'12.3 MB'."""
    return f"{fmt.compact(num_bytes)}{'B' if num_bytes >= 1000 else ' B'}"


def shown(path: Path) -> str:
    """The path as a setting names it: relative to the checkout if it is inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.absolute())


def examples_of(inputs: Inputs) -> str:
    """What data.examples has to be for a corpus of these inputs; empty: what a user likes."""
    if isinstance(inputs, PairInputs):
        separator = inputs.form.separator
        return "Pairs()" if separator == SEPARATOR else f"Pairs(separator={json.dumps(separator, ensure_ascii=False)})"
    return 'Supervised(train_on="responses")' if isinstance(inputs, ExampleInputs) else ""


def report(prepared: Prepared, target: Path, console: Console, examples: str) -> None:
    """What the corpus holds, what was left out of it, and the lines for an experiment. `examples`: what `examples_of` says."""
    found, name = prepared.inventory, shown(target)
    counted = [
        (found.empty, "empty document", "left out"),
        (found.replaced, "replacement", "by U+FFFD, of bytes that are not UTF-8"),
        (prepared.cuts, "place", "where a long document was cut, so that ids may differ from those of the whole"),
    ]
    console.header([("counted", f"{fmt.plural(number, noun)} {what}") for number, noun, what in counted if number])
    console.header([("tokens", f"{prepared.tokenizer.name} · {prepared.tokenizer.vocab_size:,} in the vocabulary")])
    console.header([("split", prepared.split.line())])
    masked = [MASK_SUM] if MASK_SUM in prepared.counts["train"] else []
    learned = "targets" if examples.startswith("Pairs") else "responses"
    rows = [["", "documents", "tokens", *[learned] * len(masked), "bytes", "tokens/byte"]]
    for part, counts in prepared.counts.items():
        ratio = f"{counts['tokens'] / counts['bytes']:.3f}" if counts["bytes"] else "–"
        rows.append([part, *(f"{counts[key]:,}" for key in ("documents", "tokens", *masked, "bytes")), ratio])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    console.lines(["", *("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows), ""])
    console.lines(["in an experiment's config.py:"])
    held_out = next((part for part in ("val", "test") if part in prepared.counts), None)
    values = {"train": f"store:{name}/train", "validation": f"store:{name}/{held_out}", "tokenizer": f"{name}/{FILE}"}
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if held_out or key != "validation"]
    settings += [f"examples={examples}"] * bool(examples)
    console.lines([*(f"  data.{setting}" for setting in settings), f"  model.vocab_size={prepared.tokenizer.vocab_size}"])
