"""Prepares a corpus from texts in four stages: a first reading, the tokenizer, the tokens, and the stores. The verb `prepare` calls it.

The first reading checks and counts (corpus_inputs.py). The tokens are written in pieces, from which unfinished work is continued
(corpus_work.py), and are then distributed to the stores of `train`, `val` and `test` (random_split.py). What a run does with text that is
not prepared is in prepare.py.

The result is a folder with train.bin, .idx and .json (research/data/token_store.py), the same of val and test, the tokenizer's files, and
sources.jsonl, a line for each file that was read. Its bytes depend on the texts and the options alone: not on the number of processes, nor
on whether the work was killed and continued.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parallel.errors import Mistake
from parallel.files import sync_tree, write_json
from research.data import random_split, tokenizer, tokenizer_file, tokenizer_processes
from research.data.corpus_inputs import Group, Inputs, Inventory
from research.data.corpus_work import RESULT, SOURCES, TOKENIZER, Work
from research.data.example_inputs import ExampleInputs, parts_of_examples
from research.data.random_split import Part, Split
from research.data.text_files import Advance
from research.data.token_store import SHORT_VOCABULARY
from research.data.tokenizer import END_OF_TEXT, TRAINED, Tokenizer
from research.data.tokenizer_file import CONFIG, FILE, TEMPLATE

FORMAT = 1
"""Part of every plan. Raise it whenever the same command would give other bytes."""
PART_TOKENS = 1 << 21
"""Tokens of a part: what is lost at most when the work is killed."""


class Progress(Protocol):
    """Shows a progress bar: called with its label, total and unit. The context yields a function that advances the bar by a number."""

    def __call__(self, label: str, total: int, unit: str, /) -> AbstractContextManager[Advance]: ...


@dataclass(frozen=True)
class Options:
    """The options that change the bytes of the result, beside those that say how texts are read (Reading)."""

    tokenizer: str
    """builtin:NAME, or the path of a tokenizer's file or folder as the user gave it."""
    tokenizer_sha256: str
    """Of the files of a tokenizer that is not built in; else empty."""
    split: str
    seed: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has made, for its report."""

    inventory: Inventory
    tokenizer: Tokenizer
    split: Split
    cuts: int
    """Places where a long document was cut and its ids may be others than those of the whole."""
    counts: dict[str, dict[str, Any]]
    """The sidecar of each part of the split."""


def plan_of(options: Options, inputs: Inputs) -> dict[str, Any]:
    """What has to be the same for unfinished work to be continued, by the name that a message gives it.

    Split and seed are used last, after the tokens are made. But a BPE is trained on the part `train`, and then they belong to the plan.
    """
    recipe = hashlib.sha256(json.dumps([FORMAT, tokenizer.RECIPE, PART_TOKENS]).encode()).hexdigest()
    plan = {"the program": recipe, "the input": inputs.identity(), "--tokenizer": [options.tokenizer, options.tokenizer_sha256]}
    return plan | ({"--split": options.split, "--seed": options.seed} if options.tokenizer.startswith(TRAINED) else {})


def prepare(
    work: Work,
    inputs: Inputs,
    options: Options,
    workers: int,
    write_tokenizer: Callable[[Path], None] | None,
    progress: Progress,
    warn: Callable[[str], None],
) -> Prepared:
    """Makes everything that is missing in `work`, up to the whole result, which is not published yet.

    `write_tokenizer` writes the files of a tokenizer that is not built in into a folder.
    """
    if why := work.begin_or_continue(plan_of(options, inputs)):
        warn(f"{why}: begun anew")
    continued = work.inventory is not None
    examples = inputs if isinstance(inputs, ExampleInputs) else None
    inventory = work.inventory
    if inventory is None:
        with progress("reading the text", inputs.file_bytes, "bytes") as advance:
            inventory = inputs.read_all(work.path / SOURCES, advance)
        work.keep_inventory(inventory)
    shares = random_split.shares_of(options.split)
    if examples is not None and Split(shares, inventory.documents, inventory.characters + 1, options.seed).by_position:
        few = f"--split {options.split} leaves {' or '.join(shares)} without an example of {inventory.documents}"
        raise Mistake(f"{few} → use more of them, or --split 100")
    _make_tokenizer(work, inputs, inventory, options, write_tokenizer, progress)
    file = work.path / TOKENIZER / FILE
    own = tokenizer_processes.open_tokenizer(options.tokenizer, file)
    if continued:
        warn(f"continued: {sum(1 for _ in work.parts())} parts of at least {PART_TOKENS:,} tokens are there already")
    cuts, tokens = _tokenize(work, inputs, own, options.tokenizer, workers, progress)

    split = Split(shares, inventory.documents, tokens, options.seed)
    result = work.path / RESULT
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(work.path / TOKENIZER, result)
    shutil.copyfile(work.path / SOURCES, result / SOURCES)
    facts = _facts(inventory, split, options, work.target.name, result / FILE, {"form": examples.form.identity} if examples else {})
    if examples is not None:  # a run of this corpus is served with the chat template that it has learned
        (result / TEMPLATE).unlink(missing_ok=True)
        if examples.form.template is not None:
            (result / TEMPLATE).write_text(examples.form.template, encoding="utf-8")
    with progress("writing the stores", tokens, "tokens") as advance:
        random_split.write_stores((part for part, _, _ in work.parts()), split, result, own, facts, advance)
    counts = {name: json.loads((result / f"{name}.json").read_text("utf-8")) for name in split.shares}
    if sum(count["documents"] for count in counts.values()) < inventory.documents or sum(c["tokens"] for c in counts.values()) != tokens:
        raise Mistake(f"a part in {work.path} is damaged → remove this folder, and run the command again")
    return Prepared(inventory, own, split, cuts, counts)


def _make_tokenizer(
    work: Work,
    inputs: Inputs,
    inventory: Inventory,
    options: Options,
    write_tokenizer: Callable[[Path], None] | None,
    progress: Progress,
) -> None:
    """The folder with tokenizer.json, and tokenizer_config.json, which names the end of a text."""
    folder, name = work.path / TOKENIZER, options.tokenizer
    if folder.is_dir():
        return
    with contextlib.ExitStack() as stack:
        making = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work.path)))
        made = making / TOKENIZER
        made.mkdir()
        if write_tokenizer is not None:
            write_tokenizer(made)
        else:
            if tokenizer.is_made_from_text(name):
                advance = stack.enter_context(progress(f"making {name}", inventory.file_bytes, "bytes"))
                if name.startswith(TRAINED):
                    shares = random_split.shares_of(options.split)
                    split = Split(shares, inventory.documents, inventory.characters + 1, options.seed)
                    seen = inputs.training_texts(split, int(inventory.characters * shares["train"]), advance)
                    text = tokenizer_processes.made_in_process(name, seen)
                else:
                    text = tokenizer.made_from(name, inputs.texts(advance))
            else:
                text = tokenizer.fixed(name).backend.to_str()
            (made / FILE).write_text(text, encoding="utf-8")
            write_config(made)
        sync_tree(made)
        made.rename(folder)


def write_config(folder: Path) -> None:
    """The tokenizer_config.json that names END_OF_TEXT."""
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(folder / CONFIG, special | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})


def _tokenize(work: Work, inputs: Inputs, own: Tokenizer, name: str, workers: int, progress: Progress) -> tuple[int, int]:
    """Makes the parts that are missing. Returns (cuts, tokens) of all parts."""
    number = done = cuts = tokens = 0
    for part, groups, its_cuts in work.parts():
        number, done, cuts, tokens = number + 1, done + groups, cuts + its_cuts, tokens + len(part.ids)
    if number == work.finished_parts:
        return cuts, tokens
    with progress("tokenizing", inputs.file_bytes, "bytes") as advance:
        file = work.path / TOKENIZER / FILE
        # what was tokenized before is read only
        if isinstance(inputs, ExampleInputs):
            examples = itertools.islice(inputs.example_groups(advance), done, None)
            masked = tokenizer_processes.encoded(((group.texts, group) for group in examples), name, file, workers, True)
            parts = parts_of_examples(masked, own, PART_TOKENS)
        else:
            left = itertools.islice(inputs.groups(own, advance), done, None)
            parts = _parts_of(tokenizer_processes.encoded(((group.texts, group) for group in left), name, file, workers), own)
        for part, groups, its_cuts in parts:
            work.keep_part(number, part, groups, its_cuts)
            number, cuts, tokens = number + 1, cuts + its_cuts, tokens + len(part.ids)
    work.finished_parts = number
    return cuts, tokens


def _parts_of(groups: Iterable[tuple[list[np.ndarray], Group]], own: Tokenizer) -> Iterator[tuple[Part, int, int]]:
    """Parts of PART_TOKENS or a little more, each with its number of groups and cuts. End-of-text follows each document."""
    dtype = np.dtype("<u2" if own.vocab_size < SHORT_VOCABULARY else "<i4")
    end = np.array([own.end_of_text], dtype)
    ids: list[np.ndarray] = []
    tokens, num_bytes = [0], [0]  # of each document so far; the last one is open
    count = cuts = size = 0
    for arrays, group in groups:
        for array, text, is_last in zip(arrays, group.texts, group.ends, strict=True):
            ids += [array.astype(dtype), end] if is_last else [array.astype(dtype)]
            tokens[-1] += len(array) + is_last
            num_bytes[-1] += len(text.encode("utf-8"))
            size += len(array) + is_last
            if is_last:
                tokens.append(0)
                num_bytes.append(0)
        count, cuts = count + 1, cuts + group.cuts
        if size >= PART_TOKENS:
            yield _part(ids, tokens, num_bytes), count, cuts
            ids, tokens, num_bytes, count, cuts, size = [], [0], [0], 0, 0, 0
    if ids:
        yield _part(ids, tokens, num_bytes), count, cuts


def _part(ids: list[np.ndarray], tokens: list[int], num_bytes: list[int]) -> Part:
    is_open = tokens[-1] > 0
    last = len(tokens) if is_open else -1
    return Part(np.concatenate(ids), np.array(tokens[:last], np.int64), np.array(num_bytes[:last], np.int64), is_open)


def _facts(inventory: Inventory, split: Split, options: Options, title: str, file: Path, form: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the sidecar of each part of the split says of its origin. `form`: how conversations became text, if they are examples."""
    loaded = tokenizer_file.load(str(file), Path())
    common = {
        "tokenizer": options.tokenizer,
        "tokenizer_sha256": loaded.fingerprint,
        "sources_sha256": inventory.sha256,
        "files": inventory.files,
        "split": {"shares": options.split, "seed": options.seed, "by": "position" if split.by_position else "document"},
        **form,
    }
    return {
        name: {
            "source": f"{title}/{name}",
            "source_sha256": hashlib.sha256(f"{name} {json.dumps(common)}".encode()).hexdigest(),
            **common,
        }
        for name in split.shares
    }
