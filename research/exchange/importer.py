"""Fills the run folder of an import: tokenizer, config.json, a checkpoint, certificate.json, and run.json with the source."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from models.conversion import mapping, read_config, write_config
from models.conversion.mapping import Plan
from models.encoder_config import BERT, T5, AnyModel
from models.estimates.parameters import parameters
from parallel.checkpoint.folder import latest
from parallel.checkpoint.writer import write
from parallel.errors import Mistake
from parallel.files import sha256_of, user_path, write_json
from research.cluster.environment import git_state
from research.config import Data, Experiment, Masked, Optimizer, Pairs, Parallel, Schedule, Spans, Track, serialization
from research.config.examples import STREAM
from research.config.layout import sample_length
from research.config.schema import MODELS
from research.data import tokenizer as tokenizers
from research.data import tokenizer_file
from research.data.pair_inputs import SEPARATOR
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import GENERATION, are_ids, ends_of, table_in
from research.exchange import left_out, parity, plain_encoder
from research.exchange.gguf import GGUFFile
from research.exchange.hf_reader import CONFIG, HFFolder
from research.exchange.pair_parity import PairParity
from research.exchange.parity import Certificate
from research.exchange.plain_encoder import HiddenCertificate
from research.exchange.source import Source, private_view, weights
from research.exchange.tokenizer_import import TokenizerImport
from research.exchange.tokenizer_parity import IdsComparison
from research.generation.sources import SourceForm, source_form
from research.tracking import run_folder
from research.tracking.console import Advance, Console, counted
from research.tracking.format import compact, memory, one_line, plural
from research.tracking.run_folder import IMPORTED, RunFolder

TEXT = ("builtin:state_of_the_union/train", "builtin:state_of_the_union/val")
CERTIFICATE = "certificate.json"
TOKENIZER = "tokenizer"
CHECKPOINT = "step_000000"
SEED = 1
"""Of the experiment that an import makes, and of heads that a plain encoder's files do not hold."""
MASKS = ("<mask>", "[MASK]")
"""The names of the token that masks: RoBERTa's, which is also ours, and BERT's."""
OTHER_TOKENIZER = "the folder's own tokenizer: --tokenizer takes its place, and token ids are not compared"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Opens a Hugging Face folder, or else a GGUF file."""
    with HFFolder(path) if path.is_dir() else GGUFFile(path) as source:
        yield source


class Import:
    """One import: its Source, and its run folder, which is made in `staging` before it is renamed to `final`.

    Paths below `tree`, the root of the repository, are saved relative to it.
    """

    def __init__(self, source: Source, staging: RunFolder, final: RunFolder, tree: Path) -> None:
        self.source, self.staging, self.final, self.tree = source, staging, final, tree
        self.model: AnyModel = mapping.with_heads_in_files(read_config.settings(source.config), source.shapes)
        self.plan: Plan = mapping.plan(self.model, source.family, source.shapes)
        self.left_out: list[str] = []
        """A sentence for each thing that the source holds and that is not taken."""
        self.ids: IdsComparison | None = None
        """The comparison of token ids with transformers' tokenizer; None if the tokenizer is not the folder's own."""
        _check_memory(self.model, source)
        source.check([key for link in self.plan.parameters for key in link.keys])

    def line(self) -> str:
        """What is imported, as one line for the terminal."""
        model, own_size = self.model, self.model.num_heads * self.model.head_size != self.model.hidden_size
        heads = plural(model.num_heads, "head") + (f" of {model.head_size}" if own_size else "")
        shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {heads}"
        size = compact(parameters(self.model) or 0)
        return f"import {self.source.path.name} · {self.source.family.name} · {shape} · {size} parameters"

    def fill(self, tokenizer_name: str | None, report: Console) -> Certificate | HiddenCertificate:
        """Writes everything into the staged folder. Small files are first, so that most errors come before gigabytes are read."""
        for folder in (self.staging.checkpoints, self.staging.logs, self.staging.path / TOKENIZER):
            folder.mkdir()
        name, tokenizer = self._make_tokenizer(tokenizer_name)
        self._list_left_out(tokenizer_name)
        report.header([("left out", sentence) for sentence in self.left_out])
        if self.ids is not None:
            report.header([("ids", self.ids.line())])
        runs = self.final.path.parent.parent
        relative_runs = runs.relative_to(self.tree) if runs.is_relative_to(self.tree) else runs
        checkpoint = self.named(self.staging.checkpoints / CHECKPOINT)
        if isinstance(self.model, T5):
            self.model = with_start(self.model, self.source.path, tokenizer)
        settings = experiment(self.model, self.source.path.name, checkpoint, name, str(relative_runs), samples_for(self.model, tokenizer))
        serialization.save(settings, self.staging.config)

        with report.progress("reading the weights", len(self.plan.parameters)) as advance:
            self._write_checkpoint(advance)
        ids = parity.sample_ids(tokenizer, sample_length(self.model))
        with report.progress("comparing with transformers", 2 * len(ids)) as advance:
            certificate = self._certify(ids, source_form(settings, tokenizer), ends_of(tokenizer, Path()), advance)
        self._write_metadata(certificate)
        return certificate

    def _certify(self, ids: Tensor, form: SourceForm | None, ends: tuple[int, ...], advance: Advance) -> Certificate | HiddenCertificate:
        """Compares logits, or hidden states of a plain encoder, of ids 'b s'. `advance` is called with 1 for each window and model.

        `form` and `ends`: what surrounds sources and ends texts, for the texts of an encoder–decoder.
        """
        model, checkpoint = self.model, latest(self.staging.checkpoints)
        if isinstance(model, T5):
            assert form
            return PairParity(model, form, ends, ids).certify(self._their_model, checkpoint, advance=advance)
        if self.plan.initial:
            assert isinstance(model, BERT)
            return plain_encoder.certify(ids, self._theirs, lambda: plain_encoder.our_hidden_states(model, checkpoint), advance)
        ahead = parity.OWN if isinstance(model, BERT) else parity.NEXT
        return parity.certify(ids, self._theirs, lambda: parity.our_logits(model, checkpoint), advance, ahead)

    def named(self, path: Path) -> str:
        """The name of a staged path after the run folder is renamed: relative to the tree if it is inside it."""
        final = self.final.path / path.relative_to(self.staging.path)
        return str(final.relative_to(self.tree)) if final.is_relative_to(self.tree) else str(final)

    def _make_tokenizer(self, name: str | None) -> tuple[str, Tokenizer]:
        """(data.tokenizer, the tokenizer). `name` is builtin:gpt2 or a file; None means the model's own one. Files are copied."""
        target = self.staging.path / TOKENIZER
        if name is not None and not tokenizer_file.is_file(name) and name != tokenizers.GPT2:
            raise Mistake(f"--tokenizer {name} is not one → name {tokenizers.GPT2} or a tokenizer.json")
        if name == tokenizers.GPT2:
            target.rmdir()
            if self.model.vocab_size < tokenizers.GPT2_SIZE:
                sizes = f"the tokenizer has {tokenizers.GPT2_SIZE} tokens, the model {self.model.vocab_size}"
                raise Mistake(f"{sizes} → name the one it was trained with: --tokenizer PATH")
            return name, tokenizers.gpt2()
        made = TokenizerImport(self.source, user_path(Path(), name) if name else None, target, self.model)
        tokenizer = made.run()
        self.left_out, self.ids = [*self.left_out, *made.left_out], made.ids
        return self.named(target / tokenizer_file.FILE), tokenizer

    def _list_left_out(self, tokenizer_name: str | None) -> None:
        """Adds what of the source is left out. `tokenizer_name`: the tokenizer that takes the place of the source's own, if one does."""
        if isinstance(self.source, GGUFFile):
            self.left_out += left_out.of_metadata(self.source.metadata)
            return
        folder, read = self.source.path, [path.name for path in self.source.files()]
        self.left_out = [
            *([plain_encoder.note(self.plan.initial)] if self.plan.initial else []),
            *left_out.of_settings(self.source.config),
            *self.left_out,
            *(left_out.of_tokenizer(folder, self.model.seq_length) if tokenizer_name is None else [OTHER_TOKENIZER]),
            *left_out.of_generation(folder),
            *left_out.of_files(folder, read),
        ]

    def _write_checkpoint(self, advance: Advance) -> None:
        """Converts the weights one parameter at a time. `advance` is called with 1 for each."""
        shapes, initial = {link.name: link.shape for link in self.plan.parameters}, list[Tensor]()
        if self.plan.initial:
            assert isinstance(self.model, BERT)
            initial = plain_encoder.initial_heads(self.model, self.plan.initial, SEED)
            shapes |= {name: tuple(tensor.shape) for name, tensor in zip(self.plan.initial, initial, strict=True)}
        digests = {path.name: sha256_of(path) for path in self.source.files()}
        facts = {"step": 0, "samples": 0, "tokens": 0, "commit": git_state(self.tree)[0], "imported": digests}
        tensors = counted(weights(self.source, self.plan, self.model), advance)
        write(self.staging.checkpoints / CHECKPOINT, shapes, itertools.chain(tensors, initial), facts)

    def _theirs(self) -> parity.Logits:
        """transformers' model, read from the same files: its logits, or a plain encoder's hidden states."""
        if isinstance(self.source, GGUFFile):
            return parity.their_gguf_logits(self.source.path, self.source.config)
        return parity.logits_of(self._their_model())

    def _their_model(self) -> nn.Module:
        """transformers' model of a folder."""
        with private_view(self.source.files(), {CONFIG: self.source.config}) as folder:
            classes = plain_encoder.CLASSES if self.plan.initial else write_config.ARCHITECTURES
            return parity.their_model(folder, self.source.family.name, self.source.path, classes)

    def _write_metadata(self, certificate: Certificate | HiddenCertificate) -> None:
        """Writes certificate.json, and run.json, which makes the folder a run."""
        ids = {"ids": self.ids.table()} if self.ids else {}
        write_json(self.staging.path / CERTIFICATE, certificate.table() | ids)
        times = {"started": run_folder.now(), "ended": run_folder.now()}
        run = {"name": self.final.name, "id": self.final.id, "status": IMPORTED, **times}
        source = {"source": str(self.source.path.name), "family": self.source.family.name}
        write_json(self.staging.run, {"schema": 1, **run, "layout": "", "precision": "fp32", "steps": 0, **run_folder.owner(), **source})


def _check_memory(model: AnyModel, source: Source) -> None:
    """Raises a Mistake if the model is too large for this machine: the certificate needs one in fp32 as a whole.

    A file that is mostly holes claims terabytes and takes none of the disk.
    """
    needed, total = 4 * (parameters(model) or 0), psutil.virtual_memory().total
    if needed > total:
        size = f"{source.path} has {compact(needed // 4)} parameters, which take {memory(needed / 1e6)} in fp32"
        raise Mistake(f"{size}, this machine has {memory(total / 1e6)} → import it on a machine with more")


def with_start(model: T5, folder: Path, tokenizer: Tokenizer) -> T5:
    """The model with the token that its targets begin with: generation_config.json's goes before config.json's, as in transformers.

    It is not set if it is end-of-text, which stands there anyway.
    """
    start: Any = table_in(folder, GENERATION).get("decoder_start_token_id")
    start = model.start_token if start is None else start
    if isinstance(start, list) or not are_ids(start) or start >= model.vocab_size:
        problem = f"{GENERATION} has decoder_start_token_id = {start!r:.60}, which is not an id below vocab_size = {model.vocab_size}"
        raise Mistake(f"{problem} → is it this model's?")
    return T5(**model.model_dump() | {"start_token": None if start == tokenizer.end_of_text else start})


def samples_for(model: AnyModel, tokenizer: Tokenizer) -> str | Masked | Spans | Pairs:
    """`data.examples` for training the model further. A BERT needs a mask, a T5 sentinels; if the tokenizer has none, training says so.

    A T5 whose targets begin with the separator of pairs was trained on pairs.
    """
    if isinstance(model, T5):
        separator = tokenizer.backend.token_to_id(SEPARATOR)
        return Spans(rate=0.15, mean_length=3.0) if separator is None or model.start_token != separator else Pairs()
    if not isinstance(model, BERT):
        return STREAM
    mask = next((name for name in MASKS if tokenizer.backend.token_to_id(name) is not None), MASKS[0])
    return Masked(rate=0.15, mask=mask, sentence_order=model.sentence_head)


def experiment(
    model: AnyModel, source: str, checkpoint: str, tokenizer: str, runs: str, examples: str | Masked | Spans | Pairs = STREAM
) -> Experiment:
    """The experiment of an import: the imported model, and defaults for training it further with a small learning rate."""
    return Experiment(
        question=f"What does {one_line(source)[:80]} know, and what does it learn when it is trained further?",
        parent=None,
        model=MODELS[model.kind](**model.model_dump()),
        init_from=checkpoint,
        data=Data(train=TEXT[0], validation=TEXT[1], tokenizer=tokenizer, examples=examples),
        schedule=Schedule(steps=100, batch_size=8, micro_batch_size=1, validate_every=50),
        optimizer=Optimizer(
            lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, decay="cosine", warmup_steps=10, min_lr=1e-6,
            label_smoothing=0.0,
        ),
        parallel=Parallel(),
        precision="fp32",
        track=Track(runs=runs),
        seed=SEED,
    )  # fmt: skip
