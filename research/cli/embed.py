"""`python -m research embed RUN`: turns texts into vectors with the encoder of a trained BERT.

Parses the command line and checks it before torch is imported. Output: a .npy or .jsonl file, a table of cosines, or one vector.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.encoder_config import BERT
from parallel.errors import Mistake
from parallel.files import published
from parallel.text import printable
from research import ROOT
from research.cli.json_output import print_json
from research.cli.trained_run import Trained, add_trust_option, find, refuse_launcher, say
from research.cli.verbs import Parser, count
from research.config.abilities import bert_of
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.generation import prompts
from research.tracking.console import Console
from research.tracking.format import one_line, plural

if TYPE_CHECKING:
    import numpy as np

WHAT = """Turns texts into vectors with the encoder of a trained BERT, for search, clustering or a classifier of your own: texts that mean
the same should have a cosine near 1. A vector is the mean of the hidden states of a text's tokens (--pooling mean), with those that the
tokenizer's template puts around it, such as [CLS] and [SEP]. That is how sentence-transformers makes vectors of MiniLM. A vector does
not depend on the texts beside it, up to rounding. Texts that are longer than model.seq_length are cut, and the command says how many."""
EXAMPLES = """examples:
  python -m research embed RUN --text 'A man is eating.' --text 'A man eats.'    # the cosine of two texts
  python -m research embed RUN --file texts.txt --out vectors.npy                # numpy.load gives an array of float32, a row for each text
  python -m research embed RUN --file texts.jsonl --out vectors.jsonl            # {"text": "…", "embedding": [0.012, …]} a line

A .jsonl file has {"text": "…"} a line, or a string. Without --out, one text prints its vector as JSON, and several a table of cosines."""
NPY, JSON_LINES = ".npy", ".jsonl"
POOLINGS = ("mean", "first")
"""The names of models.inference.sentence_encoder.POOLINGS, which imports torch."""
MOST_IN_TABLE = 12
"""The most texts whose cosines are shown: a column for each fits a terminal."""
LONGEST_SHOWN = 60


def main(argv: list[str]) -> None:
    """Writes the vectors, or shows them."""
    task = prepared(parser().parse_args(argv))
    arguments, console = task.arguments, Console(sys.stderr)
    for warning in task.warnings():
        console.warn(warning)

    from models.inference.sentence_encoder import embed
    from research.generation.restore import DecoderSpec, restored_encoder

    encoder = restored_encoder(DecoderSpec(task.folder.path, task.checkpoint, arguments.precision))
    with console.progress(f"embedding {plural(len(task.texts), 'text')}", len(task.texts), announced=False) as advance:
        vectors = embed(encoder, task.rows, arguments.pooling, arguments.normalize, arguments.batch, advance).numpy()
    if task.out:
        write(task.out, task.texts, vectors)
        console.header([("vectors", f"{task.out} · {plural(len(vectors), 'text')} · {vectors.shape[1]} numbers each")])
    elif len(task.texts) == 1:
        print_json(record(task.texts[0], vectors[0]))
    else:
        Console().lines(cosine_lines(task.texts, vectors))


# The command line, and the checks before torch is imported


@dataclass(frozen=True)
class Task(Trained):
    """A checked command."""

    model: BERT
    tokenizer: Tokenizer
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    """The number of tokens of each text, those around it included."""
    rows: tuple[tuple[int, ...], ...]
    """The ids of each text, at most model.seq_length."""

    @property
    def out(self) -> Path | None:
        """The file to write."""
        return self.arguments.out

    def warnings(self) -> Iterator[str]:
        """A sentence if texts were cut."""
        most, longer = self.model.seq_length, sum(length > self.model.seq_length for length in self.lengths)
        if longer:
            texts = f"{longer} of {plural(len(self.texts), 'text')} {'has' if longer == 1 else 'have'} more than model.seq_length = {most}"
            yield f"{texts} tokens (the longest {max(self.lengths):,}): what lies behind is not read"


def parser() -> Parser:
    """The options of `embed`."""
    parser = Parser("embed", WHAT, EXAMPLES)
    parser.add_argument("run", help="the folder of a BERT's run, its name or its title")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    add_trust_option(parser)
    source = parser.add_argument_group("what to embed; one of these, or both")
    source.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    source.add_argument("--file", help='a .jsonl file of {"text": "…"}, or any file with one text per line; -: standard input')
    vector = parser.add_argument_group("how a vector is made")
    what = "mean of the hidden states of all tokens, or the first token's ([CLS]) (default: mean)"
    vector.add_argument("--pooling", choices=POOLINGS, default="mean", help=what)
    action = argparse.BooleanOptionalAction
    vector.add_argument("--normalize", action=action, default=True, help="divide each vector by its length (default: yes)")
    output = parser.add_argument_group("output and computation")
    output.add_argument("--out", type=Path, metavar="FILE", help="a .npy or .jsonl file to write, or to replace")
    output.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    output.add_argument("--batch", type=count, default=32, metavar="N", help="number of texts computed at once (default: 32)")
    parser.set_defaults(tensor=1)
    return parser


def prepared(arguments: argparse.Namespace) -> Task:
    """The command, checked without torch."""
    refuse_launcher("embed")
    texts = [prompts.check(text, "text") for text in arguments.text]
    texts += prompts.read(arguments.file, "text") if arguments.file else []
    if not texts:
        raise Mistake("there is nothing to embed → give --text TEXT, several times if you like, or --file FILE")
    _check_out(arguments.out, len(texts))
    trained = find(arguments)
    model = bert_of("embed", trained.experiment.model, trained.folder.title)
    tokenizer = load_tokenizer(trained.experiment.data, ROOT, say)
    around = len(tokenizer.begin) + len(tokenizer.behind)
    if around >= model.seq_length:
        raise Mistake(f"the tokenizer puts {around} tokens around a text, and model.seq_length = {model.seq_length} → use another run")
    encoded = tokenizer.encode_batch(texts)
    lengths = tuple(around + len(ids) for ids in encoded)
    if 0 in lengths:
        raise Mistake(f"text {lengths.index(0) + 1} of {len(texts)} has no tokens: it is empty → leave it out")
    rows = tuple((*tokenizer.begin, *ids[: model.seq_length - around], *tokenizer.behind) for ids in encoded)
    return Task(**vars(trained), model=model, tokenizer=tokenizer, texts=tuple(texts), lengths=lengths, rows=rows)


def _check_out(out: Path | None, texts: int) -> None:
    """The file must be one that can be written, and without it there must not be too many texts to show."""
    if out is None:
        if texts > MOST_IN_TABLE:
            raise Mistake(f"the cosines of {texts} texts are no table to read, {MOST_IN_TABLE} at most → write the vectors: --out FILE.npy")
        return
    if out.suffix not in (NPY, JSON_LINES):
        raise Mistake(f"--out {out} is neither a {NPY} nor a {JSON_LINES} file → name it vectors{NPY} or vectors{JSON_LINES}")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"would lie in {out.parent}, which is no folder"
        raise Mistake(f"--out {out} {what} → name a file in a folder that exists")


# Output


def record(text: str, vector: "np.ndarray") -> dict[str, object]:
    """A line of a .jsonl file. The numbers are the shortest that give the same float32."""
    return {"text": text, "embedding": [float(str(number)) for number in vector]}


def write(out: Path, texts: tuple[str, ...], vectors: "np.ndarray") -> None:
    """Writes vectors 'n d' as an array of float32, or as a line for each text. The file appears whole, or is left as it was."""
    import numpy as np

    try:
        with published(out) as temporary:
            if out.suffix == NPY:
                with temporary.open("wb") as file:
                    np.save(file, vectors)
            else:
                with temporary.open("w", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(record(*pair), ensure_ascii=False) + "\n" for pair in zip(texts, vectors, strict=True))
    except OSError as error:
        raise Mistake(f"--out {out} cannot be written ({error.strerror or error}) → make room, or name another file") from error


def cosine_lines(texts: tuple[str, ...], vectors: "np.ndarray") -> Iterator[str]:
    """The cosines of all pairs of vectors 'n d' as an aligned table, each text behind its row."""
    import numpy as np

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    yield "   " + "".join(f"{i:8}" for i in range(1, len(texts) + 1))
    for i, (text, row) in enumerate(zip(texts, unit @ unit.T, strict=True), start=1):
        yield f"{i:3}" + "".join(f"{cosine:8.3f}" for cosine in row) + f"   {printable(one_line(text, LONGEST_SHOWN))}"
