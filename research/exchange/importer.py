"""What an import puts into a run's folder: the tokenizer, the settings, a checkpoint, the certificate, and where all of it is from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from models.config import GPT as Shape
from models.conversion import mapping, read_config
from models.conversion.mapping import Plan
from models.estimates.parameters import parameters
from parallel.checkpoint.folder import latest
from parallel.checkpoint.writer import write
from parallel.errors import Mistake
from research.cluster.environment import git_state
from research.config import GPT, Data, Experiment, Optimizer, Parallel, Schedule, Track, serialization
from research.data import tokenizer, tokenizer_file
from research.data.tokenizer import Tokenizer
from research.exchange import hf_tokenizer, parity, source
from research.exchange.gguf import GGUFFile, convert_tokenizer
from research.exchange.hf_reader import HFFolder
from research.exchange.hf_writer import write_table
from research.exchange.parity import Certificate
from research.exchange.source import Source
from research.tracking import run_folder
from research.tracking.console import Advance, Console, counted
from research.tracking.format import compact, one_line, plural
from research.tracking.run_folder import IMPORTED, RunFolder

TEXT = ("builtin:state_of_the_union/train", "builtin:state_of_the_union/val")


def experiment(model: Shape, source: str, checkpoint: str, tokenizer: str, runs: str) -> Experiment:
    """What an import asks: as the weights are, and how they would be trained further: carefully, for a little while."""
    return Experiment(
        question=f"What does {one_line(source)[:80]} know, and what does it learn when it is trained further?",
        parent=None,
        model=GPT(**model.model_dump()),
        init_from=checkpoint,
        data=Data(train=TEXT[0], validation=TEXT[1], tokenizer=tokenizer),
        schedule=Schedule(steps=100, batch_size=8, micro_batch_size=1, validate_every=50),
        optimizer=Optimizer(
            lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, decay="cosine", warmup_steps=10, min_lr=1e-6,
            label_smoothing=0.0,
        ),
        parallel=Parallel(),
        precision="fp32",
        track=Track(runs=runs),
        seed=1,
    )  # fmt: skip


CERTIFICATE = "certificate.json"
TOKENIZER = "tokenizer"
FIRST = "step_000000"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """A Hugging Face folder, or else a GGUF file."""
    with HFFolder(path) if path.is_dir() else GGUFFile(path) as source:
        yield source


class Import:
    """One import: a Source, and the folder in which its run is made before it gets the name `final` below `tree`."""

    def __init__(self, source: Source, staging: RunFolder, final: RunFolder, tree: Path) -> None:
        self.source, self.staging, self.final, self.tree = source, staging, final, tree
        self.model: Shape = read_config.settings(source.config)
        self.plan: Plan = mapping.plan(self.model, source.family, source.shapes)
        source.check([key for link in self.plan.parameters for key in link.keys])

    def line(self) -> str:
        """What is imported, as a person reads it."""
        said = f"{self.model.num_layers} layers, hidden {self.model.hidden_size}, {plural(self.model.num_heads, 'head')}"
        size = compact(parameters(self.model) or 0)
        return f"import {self.source.path.name} · {self.source.family.name} · {said} · {size} parameters"

    def fill(self, words: str | None, report: Console) -> Certificate:
        """Makes everything in the staged folder. Small things first: what cannot work is known before gigabytes are read."""
        for folder in (self.staging.checkpoints, self.staging.logs, self.staging.path / TOKENIZER):
            folder.mkdir()
        name, ours = self._tokenizer(words)
        serialization.save(self._experiment(name), self.staging.config)
        with report.progress("reading the weights", len(self.plan.parameters)) as advance:
            self._weights(advance)
        ids = parity.sample_ids(ours, self.model.seq_length)
        with report.progress("comparing with transformers", 2 * len(ids)) as advance:
            certificate = parity.certify(ids, self._theirs, self._ours, advance)
        self._facts(certificate)
        return certificate

    def named(self, path: Path) -> str:
        """A staged path as settings name it when the run has its place: relative to the tree where it lies in it."""
        place = self.final.path / path.relative_to(self.staging.path)
        return str(place.relative_to(self.tree)) if place.is_relative_to(self.tree) else str(place)

    def _tokenizer(self, words: str | None) -> tuple[str, Tokenizer]:
        """(what data.tokenizer says, the tokenizer): one of ours, another file, or the model's own, which are copied."""
        target, length = self.staging.path / TOKENIZER, self.model.seq_length
        if words is not None and not tokenizer_file.is_file(words) and words != tokenizer.GPT2:
            raise Mistake(f"--tokenizer {words} is not one → name {tokenizer.GPT2} or a tokenizer.json")
        if words == tokenizer.GPT2:
            target.rmdir()
            name, found = words, tokenizer.gpt2()
        else:
            if words is None and isinstance(self.source, GGUFFile):
                backend, told = convert_tokenizer(self.source)
                hf_tokenizer.put(target, backend, told, told["chat_template"], length)
            else:
                file = Path(words).expanduser() if words else self.source.path / tokenizer_file.FILE
                hf_tokenizer.take(file, target, length, self.source.config)
            name, found = self.named(target / tokenizer_file.FILE), tokenizer_file.load(str(target / tokenizer_file.FILE), Path())
        if found.vocab_size > self.model.vocab_size:
            sizes = f"the tokenizer has {found.vocab_size} tokens, the model {self.model.vocab_size}"
            raise Mistake(f"{sizes} → name the one it was trained with: --tokenizer PATH")
        return name, found

    def _experiment(self, tokenizer: str) -> Experiment:
        runs = self.final.path.parent.parent
        below = runs.relative_to(self.tree) if runs.is_relative_to(self.tree) else runs
        saved = self.named(self.staging.checkpoints / FIRST)
        return experiment(self.model, self.source.path.name, saved, tokenizer, str(below))

    def _weights(self, advance: Advance) -> None:
        """The checkpoint: a parameter at a time from their files into ours."""
        shapes = {link.name: link.shape for link in self.plan.parameters}
        facts = {"step": 0, "samples": 0, "tokens": 0, "commit": git_state(self.tree)[0], "imported": source.digests(self.source)}
        write(self.staging.checkpoints / FIRST, shapes, counted(source.weights(self.source, self.plan, self.model), advance), facts)

    def _theirs(self) -> parity.Logits:
        """transformers' own reading of the same files."""
        if isinstance(self.source, GGUFFile):
            return parity.their_gguf_logits(self.source.path, self.source.config)
        with source.view(self.source.files()) as only_these:
            return parity.their_logits(only_these, self.source.family.name)

    def _ours(self) -> parity.Logits:
        return parity.our_logits(self.model, latest(self.staging.checkpoints))

    def _facts(self, certificate: Certificate) -> None:
        """certificate.json, and run.json, which makes the folder a run."""
        write_table(self.staging.path / CERTIFICATE, certificate.table())
        told = {"name": self.final.name, "id": self.final.id, "status": IMPORTED, "started": run_folder.now(), "ended": run_folder.now()}
        source = {"source": str(self.source.path.name), "family": self.source.family.name}
        write_table(self.staging.run, {"schema": 1, **told, "layout": "", "precision": "fp32", "steps": 0, **run_folder.owner(), **source})
