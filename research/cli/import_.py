"""`python -m research import MODEL --as experiments/NAME`: imports another program's model as a run and an experiment."""

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import Mistake
from parallel.files import refuse_existing, staged
from research.cli.verbs import Parser
from research.config import experiment_folder, serialization
from research.exchange.other_formats import refuse_other_formats
from research.tracking import run_folder
from research.tracking.console import Console
from research.tracking.own_runs import is_own, mark_as_own
from research.tracking.run_folder import RunFolder

DESCRIPTION = """Reads GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2, Qwen3, T5, UMT5, BERT and MegatronBERT (also without heads, as
sentence encoders are) from a Hugging Face folder (safetensors), and Llama, Mistral, Qwen2 and Qwen3 from a .gguf file. Makes a run folder
with a checkpoint, which every layout can read, and an experiment whose runs begin with it (init_from). Says what of the folder it leaves
out. Compares transformers' tokenizer and model with ours on the same text: if the models differ by more than rounding, the exit code is 1
and both folders are removed."""
GGUF = ".gguf"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")


@dataclass(frozen=True)
class Place:
    """The folders of an import: the experiment in its tree, and the run, which is made in `staging` first."""

    tree: Path
    experiment: Path
    run: RunFolder
    staging: RunFolder


def main(argv: list[str]) -> None:
    """Reads the model, compares, and publishes the run and the experiment."""
    parser = Parser("import", DESCRIPTION)
    parser.add_argument("model", type=Path, help="a Hugging Face folder, or a .gguf file")
    parser.add_argument("--as", dest="experiment", type=Path, required=True, help="the experiment's folder to create: experiments/NAME")
    parser.add_argument("--runs", type=Path, help="the folder in which NAME/ID/ is created (default: runs, beside experiments)")
    parser.add_argument("--tokenizer", help="builtin:gpt2 or the path of a tokenizer.json, instead of the model's own")
    arguments = parser.parse_args(argv)
    check_exists(arguments.model)
    report = Console()
    with _staged(arguments.experiment, arguments.runs) as place:
        # imported here because it imports torch
        from research.exchange.importer import CERTIFICATE, Import, opened

        with opened(arguments.model) as source:
            job = Import(source, place.staging, place.run, place.tree)
            report.header([("", job.line())])
            certificate = job.fill(arguments.tokenizer, report)
            report.header([("parity", certificate.line())])
            if not certificate.passed:
                raise SystemExit(1)
            publish(place)
            run = job.named(place.staging.path)
            if not is_own(place.run):
                report.warn(f"the mark of {run} could not be written, so verbs that use the run will need --trust")
        report.header([("run", f"{run} · {CERTIFICATE}"), ("folder", str(arguments.experiment))])
        generate = [f"python -m research generate {run} --prompt 'The meaning of life is'"]
        uses = {
            "gpt": generate,
            "t5": generate,
            "bert": [f"python -m research embed {run} --text 'A man is eating.' --text 'A man eats.'"],
        }
        report.next([*uses.get(job.model.kind, []), f"python {arguments.experiment / experiment_folder.LAUNCHER} --dry-run"])


def check_exists(model: Path) -> None:
    """Raises a Mistake unless the path is a folder or a .gguf file."""
    if not model.exists():
        raise Mistake(f"there is no {model} → name a Hugging Face folder or a .gguf file on this machine: nothing is downloaded")
    if not model.is_dir() and model.suffix != GGUF:
        raise Mistake(f"{model} is neither a folder nor a {GGUF} file → name the folder that holds the model's config.json")
    if model.is_dir():
        refuse_other_formats(model)


def publish(place: Place) -> None:
    """Gives both folders their final names. If one of them fails, neither is left."""
    try:
        with staged(place.experiment) as folder:
            experiment_folder.write(folder, serialization.load(place.staging.config), place.tree)
            run_folder.keep_source(place.staging, folder)
            mark_as_own(place.staging)
            place.run.path.parent.mkdir(parents=True, exist_ok=True)
            place.staging.path.rename(place.run.path)
    except BaseException:
        shutil.rmtree(place.run.path, ignore_errors=True)
        raise
    run_folder.point_latest(place.run.path.parent)


@contextlib.contextmanager
def _staged(experiment: Path, runs: Path | None) -> Iterator[Place]:
    """Yields the place with an empty, hidden folder for the run, which is removed at the end unless it was published."""
    folder = experiment.resolve()
    tree = folder.parent.parent
    if not NAME.fullmatch(folder.name) or folder.parent.name != "experiments" or not (tree / "research" / "launch.py").is_file():
        raise Mistake(f"--as {experiment} is not the place of an experiment → write --as experiments/NAME")
    refuse_existing(folder)
    root = (runs or tree / "runs").resolve()
    run_id = secrets.token_hex(3)
    hidden = root / f".import-{folder.name}-{run_id}"
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise Mistake(f"--runs: {hidden} cannot be made ({error.strerror}) → name a folder you may write") from None
    try:
        yield Place(tree, folder, RunFolder(root / folder.name / run_id), RunFolder(hidden))
    except OSError as error:
        where = str(error.filename2 or error.filename or hidden).replace(str(hidden), str(root / folder.name / run_id))
        raise Mistake(f"{where} cannot be written ({error.strerror or error}) → make room, or name another folder: --runs") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
