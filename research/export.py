"""`python -m research export RUN FOLDER`: a run's weights as a Hugging Face folder, proved to be the same."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from models import hf, hf_config
from models.hf_families import FAMILIES
from parallel.checkpoint_folder import MANIFEST, latest, megabytes
from parallel.checkpoint_reader import Reader, check_shape
from parallel.errors import Mistake
from research import config, counterparts, exchange, hf_tokenizer, hf_writer, parity, run_folder
from research.config import Experiment
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.hf_reader import CONFIG
from research.importing import CERTIFICATE
from research.parity import Certificate
from research.report import Advance, Report, counted
from research.run_folder import RunFolder
from research.verbs import Parser

ROOT = Path(__file__).resolve().parent.parent
WHAT = """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load: safetensors, config.json, the tokenizer,
generation_config.json, and certificate.json: the same text through transformers' model and through ours. Exit code 1, and nothing is
left, where they differ by more than rounding."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    """Exports, and says what was found."""
    parser = Parser("export", WHAT)
    parser.add_argument("run", help="a run's folder, name or title (its newest checkpoint), or a checkpoint's folder")
    parser.add_argument("folder", type=Path, help="the folder to be made")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="what weights are rounded to (default: float32)")
    parser.add_argument("--shard-size", default="4GB", help="largest file of weights: 500MB, 4GB (the default)")
    asked = parser.parse_args(argv)
    run, checkpoint = named(asked.run)
    report = Report()
    exchange.refuse_existing(asked.folder)
    found = Export(run, checkpoint, asked.dtype, size_of(asked.shard_size))
    report.header([("", found.line()), *(("note", said) for said in found.notes())])
    with exchange.staged(asked.folder) as folder:
        with report.progress("writing the weights", len(found.links)) as advance:
            found.write(folder, advance)
        ids = parity.sample_ids(found.tokenizer, found.model.seq_length)
        with report.progress("comparing with transformers", 2 * len(ids)) as advance:
            certificate = found.certified(folder, ids, advance)
        report.header([("parity", certificate.line())])
        if not certificate.passed:
            raise SystemExit(1)
    report.header([("saved", f"{asked.folder} ({megabytes(sum(path.stat().st_size for path in asked.folder.iterdir()))})")])


def named(handle: str) -> tuple[RunFolder, Path]:
    """(run, checkpoint): of a run its newest one."""
    path = Path(handle)
    if not (path / MANIFEST).is_file():
        run = run_folder.find(handle)
        return run, latest(run.checkpoints)
    run = RunFolder(path.resolve().parent.parent)
    if not run.config.is_file():
        raise Mistake(f"{handle} is a checkpoint outside of a run's folder → name one in runs/NAME/ID/checkpoints")
    return run, path.resolve()


def size_of(text: str) -> int:
    """'500MB' -> 500 000 000."""
    found = re.fullmatch(r"(\d{1,12})(KB|MB|GB|)", text.strip().upper())
    if not found or not int(found[1]):
        raise Mistake(f"--shard-size {text} is not a size → write 500MB or 4GB")
    return int(found[1]) * UNITS[found[2]]


class Export:
    """One export: what of a run becomes which files."""

    def __init__(self, run: RunFolder, checkpoint: Path, dtype: str, shard_size: int) -> None:
        self.run, self.checkpoint, self.dtype, self.shard_size = run, checkpoint, dtype, shard_size
        self.experiment: Experiment = config.load(run.config)
        self.model = self.experiment.model
        self.family = hf.family_of(self.model)
        self.links = hf.links(self.model, FAMILIES[self.family])
        self.tokenizer: Tokenizer = load_tokenizer(self.experiment.data, ROOT)
        if self.tokenizer.vocab_size > self.model.vocab_size:
            sizes = f"data.tokenizer has {self.tokenizer.vocab_size} tokens, model.vocab_size is {self.model.vocab_size}"
            raise Mistake(f"{sizes} → put the tokenizer back that {run.title} was trained with")

    def line(self) -> str:
        """What is exported, as a person reads it."""
        return f"export {self.run.title} · {self.checkpoint.name} · {hf_config.ARCHITECTURES[self.family]} · {self.dtype}"

    def notes(self) -> list[str]:
        """Settings that stay behind, and what may surprise."""
        behind = ", ".join(hf_config.left_behind(self.model, self.family))
        return [f"of training only, without a counterpart in {self.family}, left behind: {behind}"]

    def write(self, folder: Path, advance: Advance) -> None:
        """All files but the certificate; `advance` by one for each parameter."""
        ids = hf_tokenizer.write(folder, self.tokenizer, ROOT, self.model.seq_length)
        table = hf_config.config(self.model, self.family, self.dtype, ids["bos_token_id"], ids["eos_token_id"])
        hf_writer.write_table(folder / CONFIG, table)
        shapes = [hf_writer.Written(key, shape) for link in self.links for key, shape in link.their_shapes(self.model).items()]
        with Reader(self.checkpoint) as reader:
            for link in self.links:
                check_shape(link.name, link.shape, reader)
            reader.check()
            hf_writer.write_weights(folder, hf_writer.shards(shapes, self.dtype, self.shard_size), self._tensors(reader, advance))

    def certified(self, folder: Path, ids: Tensor, advance: Advance) -> Certificate:
        """Of the folder as a user loads it, against the checkpoint, its weights rounded likewise; written into the folder.

        ids 'b s'; `advance` by one for each window and model.
        """
        dtype = DTYPES[self.dtype]
        certificate = parity.certify(
            ids,
            lambda: counterparts.their_auto_logits(folder),
            lambda: counterparts.our_logits(self.model, self.checkpoint, dtype),
            advance,
        )
        about = {"run": self.run.title, "checkpoint": self.checkpoint.name, "dtype": self.dtype}
        hf_writer.write_table(folder / CERTIFICATE, about | certificate.table())
        return certificate

    def _tensors(self, reader: Reader, advance: Advance) -> Iterator[Tensor]:
        """Every tensor of theirs, one of ours in memory at a time."""
        for link in counted(self.links, advance):
            yield from link.theirs(reader.read(link.name), self.model).values()
