"""What an export puts into a folder: a run's weights, settings and tokenizer as transformers reads them, and the certificate."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.conversion import mapping, write_config
from models.conversion.families import FAMILIES
from parallel.checkpoint.reader import Reader, check_shape
from parallel.errors import Mistake
from research import ROOT
from research.config import Experiment, serialization
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.exchange import hf_tokenizer, hf_writer, parity
from research.exchange.hf_reader import CONFIG
from research.exchange.importer import CERTIFICATE
from research.exchange.parity import Certificate
from research.tracking.console import Advance, counted
from research.tracking.run_folder import RunFolder


class Export:
    """One export: what of a run becomes which files."""

    def __init__(self, run: RunFolder, checkpoint: Path, dtype: str, shard_size: int) -> None:
        self.run, self.checkpoint, self.dtype, self.shard_size = run, checkpoint, dtype, shard_size
        self.experiment: Experiment = serialization.load(run.config)
        self.model = self.experiment.model
        self.family = mapping.family_of(self.model)
        self.links = mapping.parameter_mappings(self.model, FAMILIES[self.family])
        self.tokenizer: Tokenizer = load_tokenizer(self.experiment.data, ROOT)
        if self.tokenizer.vocab_size > self.model.vocab_size:
            sizes = f"data.tokenizer has {self.tokenizer.vocab_size} tokens, model.vocab_size is {self.model.vocab_size}"
            raise Mistake(f"{sizes} → put the tokenizer back that {run.title} was trained with")

    def line(self) -> str:
        """What is exported, as a person reads it."""
        return f"export {self.run.title} · {self.checkpoint.name} · {write_config.ARCHITECTURES[self.family]} · {self.dtype}"

    def notes(self) -> list[str]:
        """Settings that stay behind, and what may surprise."""
        behind = ", ".join(write_config.left_behind(self.model, self.family))
        return [f"of training only, without a counterpart in {self.family}, left behind: {behind}"]

    def write(self, folder: Path, advance: Advance) -> None:
        """All files but the certificate; `advance` by one for each parameter."""
        ids = hf_tokenizer.write(folder, self.tokenizer, ROOT, self.model.seq_length)
        table = write_config.config(self.model, self.family, self.dtype, ids["bos_token_id"], ids["eos_token_id"])
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
        dtype = getattr(torch, self.dtype)
        certificate = parity.certify(
            ids,
            lambda: parity.their_auto_logits(folder),
            lambda: parity.our_logits(self.model, self.checkpoint, dtype),
            advance,
        )
        about = {"run": self.run.title, "checkpoint": self.checkpoint.name, "dtype": self.dtype}
        hf_writer.write_table(folder / CERTIFICATE, about | certificate.table())
        return certificate

    def _tensors(self, reader: Reader, advance: Advance) -> Iterator[Tensor]:
        """Every tensor of theirs, one of ours in memory at a time."""
        for link in counted(self.links, advance):
            yield from link.theirs(reader.read(link.name), self.model).values()
