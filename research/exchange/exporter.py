"""Fills the folder of an export: a run's weights, settings and tokenizer in transformers' format, and certificate.json."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.conversion import mapping, write_config
from models.conversion.families import FAMILIES
from models.encoder_config import BERT, T5
from parallel.checkpoint.reader import Reader, check_shape
from parallel.errors import Mistake
from parallel.files import write_json
from research import ROOT
from research.config import Experiment
from research.config.abilities import refuse_other_kinds
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import GENERATION, ends_of, read_tokenizer_table
from research.exchange import hf_tokenizer, hf_writer, parity, tokenizer_parity
from research.exchange.hf_reader import CONFIG
from research.exchange.importer import CERTIFICATE
from research.exchange.pair_parity import PairParity
from research.exchange.parity import Certificate
from research.generation.sources import source_form
from research.tracking.console import Advance, counted
from research.tracking.run_folder import RunFolder

UNTIED = (
    "transformers 5 multiplies the logits of every UMT5 by hidden_size^-1/2, ours of an untied one are not: set "
    "model.config.tie_word_embeddings = False after from_pretrained for equal logits, as the certificate does"
)


class Export:
    """One export: a checkpoint of a run, the run's settings, and the dtype and shard size of the files."""

    def __init__(self, run: RunFolder, checkpoint: Path, experiment: Experiment, dtype: str, shard_size: int) -> None:
        self.run, self.checkpoint, self.dtype, self.shard_size = run, checkpoint, dtype, shard_size
        self.experiment = experiment
        refuse_other_kinds("export", experiment.model, run.title)
        self.model = experiment.model
        self.family = mapping.family_of(self.model)
        self.links = mapping.parameter_mappings(self.model, FAMILIES[self.family])
        self.tokenizer: Tokenizer = load_tokenizer(self.experiment.data, ROOT)
        if self.tokenizer.vocab_size > self.model.vocab_size:
            sizes = f"data.tokenizer has {self.tokenizer.vocab_size} tokens, model.vocab_size is {self.model.vocab_size}"
            raise Mistake(f"{sizes} → put the tokenizer back that {run.title} was trained with")
        self.source = source_form(experiment, self.tokenizer) if isinstance(self.model, T5) else None

    def line(self) -> str:
        """What is exported, as one line for the terminal."""
        return f"export {self.run.title} · {self.checkpoint.name} · {write_config.architecture(self.model, self.family)} · {self.dtype}"

    def notes(self) -> list[str]:
        """What a user should know: the settings of the model that transformers has no counterpart for."""
        settings = ", ".join(write_config.left_behind(self.model, self.family))
        notes = [f"of training only, without a counterpart in {self.family}, left behind: {settings}"]
        if self.source and self.tokenizer.backend.encode("").ids[-1:] != [self.source.end]:
            end = self.tokenizer.decode([self.source.end])
            notes.append(f"a source ends with {end!r} ({self.source.end}), which the tokenizer does not add: tokenizer(text + {end!r})")
        if isinstance(self.model, T5) and not self.model.tied:
            notes.append(UNTIED)
        return notes

    def write(self, folder: Path, advance: Advance) -> None:
        """Writes all files but the certificate. `advance` is called with 1 for each parameter."""
        length = self.model.source_length if isinstance(self.model, T5) else self.model.seq_length
        ids = hf_tokenizer.export_tokenizer(folder, self.tokenizer, ROOT, length)
        config = write_config.config(self.model, self.family, self.dtype, ids["bos_token_id"], ids["eos_token_id"])
        write_json(folder / CONFIG, config | (self._write_generation(folder) if self.source else {}))
        shapes = [hf_writer.TensorShape(key, shape) for link in self.links for key, shape in link.their_shapes(self.model).items()]
        with Reader(self.checkpoint) as reader:
            for link in self.links:
                check_shape(link.name, link.shape, reader)
            reader.check()
            # one of our parameters is in memory at a time
            tensors = (t for link in counted(self.links, advance) for t in link.theirs(reader.read(link.name), self.model).values())
            hf_writer.write_weights(folder, hf_writer.assign_files(shapes, self.dtype, self.shard_size), tensors)

    def _write_generation(self, folder: Path) -> dict[str, Any]:
        """Adds to generation_config.json what a target begins with, and what follows its end, and returns it.

        Without a padding token, end-of-text stands behind the end of a text. transformers' cache has as many layers as the encoder: where
        the decoder has more, it is switched off.
        """
        assert self.source and isinstance(self.model, T5)
        table = read_tokenizer_table(folder / GENERATION)
        added: dict[str, Any] = {
            "decoder_start_token_id": self.source.start,
            "pad_token_id": table.get("pad_token_id", self.tokenizer.end_of_text),
        }
        if self.model.num_layers > self.model.num_encoder_layers:
            added["use_cache"] = False
        write_json(folder / GENERATION, {"eos_token_id": self.tokenizer.end_of_text} | table | added)
        return added

    def certify(self, folder: Path, ids: Tensor, advance: Advance) -> Certificate:
        """Compares the folder, as a user loads it, with the checkpoint, its weights rounded to the same dtype.

        ids 'b s'; `advance` is called with 1 for each window and model. Writes certificate.json.
        """
        compared = tokenizer_parity.compare(self.tokenizer, tokenizer_parity.their_tokenizer(folder, folder))
        if compared.difference:
            raise Mistake(
                f"transformers reads another tokenizer from this export: {compared.difference} → report this, with data.tokenizer"
            )
        dtype = getattr(torch, self.dtype)
        if isinstance(self.model, T5):
            assert self.source
            pairs = PairParity(self.model, self.source, ends_of(self.tokenizer, ROOT), ids)
            certificate = pairs.certify(lambda: parity.their_auto_model(folder), self.checkpoint, dtype, advance)
        else:
            certificate = parity.certify(
                ids,
                lambda: parity.their_auto_logits(folder),
                lambda: parity.our_logits(self.model, self.checkpoint, dtype),
                advance,
                parity.OWN if isinstance(self.model, BERT) else parity.NEXT,
            )
        origin = {"run": self.run.title, "checkpoint": self.checkpoint.name, "dtype": self.dtype}
        write_json(folder / CERTIFICATE, origin | certificate.table() | {"ids": compared.table()})
        return certificate
