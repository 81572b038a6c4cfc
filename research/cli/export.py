"""`python -m research export RUN FOLDER`: writes a run as a Hugging Face folder, and compares its logits with transformers'."""

import re
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import megabytes, refuse_existing, staged
from research.cli.trained_run import add_trust_option, say_choice, settings_of_run
from research.cli.verbs import Parser
from research.config.layout import sample_length
from research.tracking import run_folder
from research.tracking.console import Console

DESCRIPTION = """Writes a folder that transformers' from_pretrained and AutoTokenizer.from_pretrained load: safetensors, config.json,
the tokenizer, generation_config.json, and certificate.json, which compares transformers' model with ours on the same text. If they differ
by more than rounding, the exit code is 1 and the folder is removed."""
DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    """Writes the folder, compares, and publishes it."""
    parser = Parser("export", DESCRIPTION)
    parser.add_argument("run", help="a run's folder, name or title (its newest checkpoint), or a checkpoint's folder")
    parser.add_argument("folder", type=Path, help="the folder to create")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="the dtype of the weights (default: float32)")
    parser.add_argument("--shard-size", default="4GB", help="largest file of weights: 500MB, 4GB (the default)")
    add_trust_option(parser)
    arguments = parser.parse_args(argv)
    run, checkpoint = run_folder.find_checkpoint(arguments.run, needs="config.json")
    say_choice(arguments.run, run)
    shard_size = size_of(arguments.shard_size)
    refuse_existing(arguments.folder)
    # imported here because both import torch
    from research.exchange import parity
    from research.exchange.exporter import Export

    report = Console()
    export = Export(run, checkpoint, settings_of_run(arguments, run), arguments.dtype, shard_size)
    report.header([("", export.line()), *(("note", note) for note in export.notes())])
    with staged(arguments.folder) as folder:
        with report.progress("writing the weights", len(export.links)) as advance:
            export.write(folder, advance)
        ids = parity.sample_ids(export.tokenizer, sample_length(export.model))
        with report.progress("comparing with transformers", 2 * len(ids)) as advance:
            certificate = export.certify(folder, ids, advance)
        report.header([("parity", certificate.line())])
        if not certificate.passed:
            raise SystemExit(1)
    size = megabytes(sum(path.stat().st_size for path in arguments.folder.iterdir()))
    report.header([("saved", f"{arguments.folder} ({size})")])


def size_of(text: str) -> int:
    """Converts a size to bytes: '500MB' -> 500 000 000."""
    match = re.fullmatch(r"(\d{1,12})(KB|MB|GB|)", text.strip().upper())
    if not match or not int(match[1]):
        raise Mistake(f"--shard-size {text} is not a size → write 500MB or 4GB")
    return int(match[1]) * UNITS[match[2]]
