"""`python -m research export RUN FOLDER`: a run's weights as a Hugging Face folder, proved to be the same."""

import argparse
import re
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import megabytes, refuse_existing, staged
from research.cli.verbs import Parser
from research.tracking import run_folder
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder

WHAT = """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load: safetensors, config.json, the tokenizer,
generation_config.json, and certificate.json: the same text through transformers' model and through ours. Exit code 1, and nothing is
left, where they differ by more than rounding."""
DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    """Exports, and says what was found."""
    parser = Parser("export", WHAT)
    parser.add_argument("run", help="a run's folder, name or title (its newest checkpoint), or a checkpoint's folder")
    parser.add_argument("folder", type=Path, help="the folder to be made")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="what weights are rounded to (default: float32)")
    parser.add_argument("--shard-size", default="4GB", help="largest file of weights: 500MB, 4GB (the default)")
    asked = parser.parse_args(argv)
    run, checkpoint = run_folder.find_checkpoint(asked.run, needs="config.json")
    size = size_of(asked.shard_size)
    refuse_existing(asked.folder)
    _export(asked, run, checkpoint, size)


def _export(asked: argparse.Namespace, run: RunFolder, checkpoint: Path, size: int) -> None:
    """Writes, compares and publishes."""
    from research.exchange import parity
    from research.exchange.exporter import Export

    report = Console()
    found = Export(run, checkpoint, asked.dtype, size)
    report.header([("", found.line()), *(("note", said) for said in found.notes())])
    with staged(asked.folder) as folder:
        with report.progress("writing the weights", len(found.links)) as advance:
            found.write(folder, advance)
        ids = parity.sample_ids(found.tokenizer, found.model.seq_length)
        with report.progress("comparing with transformers", 2 * len(ids)) as advance:
            certificate = found.certified(folder, ids, advance)
        report.header([("parity", certificate.line())])
        if not certificate.passed:
            raise SystemExit(1)
    report.header([("saved", f"{asked.folder} ({megabytes(sum(path.stat().st_size for path in asked.folder.iterdir()))})")])


def size_of(text: str) -> int:
    """'500MB' -> 500 000 000."""
    found = re.fullmatch(r"(\d{1,12})(KB|MB|GB|)", text.strip().upper())
    if not found or not int(found[1]):
        raise Mistake(f"--shard-size {text} is not a size → write 500MB or 4GB")
    return int(found[1]) * UNITS[found[2]]
