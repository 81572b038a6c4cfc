"""Trained models from Python: logits, hidden states, attention, generated text and metrics, for a notebook or a script anywhere.

    from research import api

    model = api.load("gpt_sotu")
    model.generate("My fellow citizens")

Everything runs in this process, on its GPU if there is one. docs/python.md is the guide. Errors that a caller can correct are
`Mistake`s, whose message ends in the way out.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from models.config import GPT
from models.inference.sampling_params import SamplingParams
from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake, listed, nearest
from parallel.grid import Grid
from parallel.layers import Call, PlainModule, unique_parameters
from research import ROOT
from research.config import Experiment
from research.config.abilities import gpt_of
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import ends_of
from research.exchange.limited_tokenizer import try_tokenizer
from research.generation.batching import CANCELLED
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec, restored
from research.generation.settings import DEFAULT_TOKENS, GenerationSettings, text_seed
from research.generation.trust import WAY_OUT, said_of_trust, trusted_settings
from research.tracking import metrics as rows
from research.tracking import run_folder
from research.tracking.own_runs import is_own
from research.tracking.run_folder import RunFolder

Ids: TypeAlias = Sequence[int] | Tensor
"""Token ids: one sequence as a list or a tensor 's', or a batch of equal lengths as a tensor 'b s'."""


def runs() -> list[str]:
    """The title of every run in the runs/ folder of this checkout, newest first. Each can be passed to `load` and `metrics`."""
    found = run_folder.every(ROOT / "runs")
    return [folder.title for folder in sorted(found, key=lambda folder: folder.run.stat().st_mtime, reverse=True)]


def load(run: str | Path, step: int | None = None, precision: str | None = None, trust: bool = False) -> "Model":
    """The model of a run, or of an imported model, with the weights of its newest checkpoint or of the one of `step`.

    `run`: a run's folder or one of its checkpoints, an experiment's name (its newest run), or a title such as gpt_sotu-7f3a2c.
    Relative paths start from the working directory or else from the checkout. `precision`: fp32, bf16 or fp16; None: that of
    training, except that fp16 becomes fp32 on a CPU. Executes the variant.py that the run's folder keeps if the run's settings name
    classes of it: only of a run that this checkout has made, a variant.py that an experiment of it has, too, or a run that you `trust`.
    A run that you trust is marked, and counts as one that this checkout has made from then on.
    """
    folder, checkpoint = run_folder.find_checkpoint(_handle(run), ROOT / "runs")
    if step is not None:
        steps = {checkpoint_folder.step_of(path): path for path in checkpoint_folder.steps(folder.checkpoints)}
        if step not in steps:
            raise Mistake(f"{folder.title} has no checkpoint of step {step} → it has {listed(steps, 'and') or 'none'}")
        checkpoint = steps[step]
    return Model(folder, checkpoint, precision, trust)


def metrics(run: str | Path) -> dict[str, np.ndarray]:
    """The rows of a run's metrics.jsonl as columns of one length: `pandas.DataFrame(api.metrics(run))` is a table.

    A row that lacks a column's key has NaN there: a row of training has no val/loss. All values are float64.
    """
    table = list(rows.read(run_folder.find(_handle(run), ROOT / "runs").metrics))
    names = dict.fromkeys(name for row in table for name, value in row.items() if isinstance(value, (int, float)))
    return {name: np.array([row.get(name, np.nan) for row in table], dtype=np.float64) for name in names}


def _handle(run: str | Path) -> str:
    """`run`, or the same path in the checkout if there is nothing at that path from the working directory."""
    return str(ROOT / run) if not Path(run).exists() and (ROOT / run).exists() else str(run)


class Model:
    """A trained model. Ids go in and tensors come out on the CPU, at least fp32, without gradients.

    Use `module` itself for gradients, hooks or changes. A method that takes ids accepts one sequence, and then returns tensors
    without the batch dim 'b', or a batch 'b s' of sequences of one length.
    """

    def __init__(self, folder: RunFolder, checkpoint: Path, precision: str | None = None, trust: bool = False) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.experiment: Experiment = trusted_settings(folder, trust)
        if not is_own(folder):
            if trust:
                warnings.warn(said_of_trust(folder), stacklevel=3)
            else:
                try_tokenizer(self.experiment.data.tokenizer, ROOT, WAY_OUT)
        self._config = gpt_of("research.api", self.experiment.model, folder.title)
        self._spec = DecoderSpec(folder.path, checkpoint, precision, slots=1, context=self._config.seq_length)
        self.module: PlainModule = restored(self._spec, Grid())
        """The torch module, in evaluation mode: ids 'b s' -> logits 'b s v'."""

    def __repr__(self) -> str:
        return f"<{self.folder.title}, step {self.step}, {sum(p.numel() for p in self.module.parameters()):,} parameters>"

    @property
    def config(self) -> GPT:
        """The settings of the model: `config.num_layers`, `config.hidden_size`, …"""
        return self._config

    @property
    def step(self) -> int:
        """The number of optimizer steps behind the weights."""
        return checkpoint_folder.step_of(self.checkpoint)

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in order: embedding, …, blocks.0, …, head."""
        return [layer.name for layer, _ in self.module.steps]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training text."""
        return load_tokenizer(self.experiment.data, ROOT)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, as the prompt of a generation has them. An empty text starts a document."""
        return list(self.tokenizer.prompt(text))

    def decode(self, ids: Ids) -> str:
        """The text of one sequence of ids; bytes that form no complete character become U+FFFD."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else ids)

    def weights(self) -> dict[str, Tensor]:
        """The parameters by logical name, the names that checkpoints use. They share the module's memory."""
        return {name: parameter.detach() for name, parameter in unique_parameters(self.module)}

    @torch.inference_mode()
    def logits(self, ids: Ids) -> Tensor:
        """'s' -> 's v': at each position, the logits of the token after it. A batch 'b s' -> 'b s v'."""
        return _result(self.module(self._batch(ids)), ids)

    def log_probabilities(self, ids: Ids) -> Tensor:
        """'s' -> 's-1': the natural log-probability of every id but the first, given all ids before it. A batch: 'b s-1'."""
        batch = self._batch(ids).cpu()
        found = self.logits(batch)[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
        return _result(found, ids)

    @torch.inference_mode()
    def hidden_states(self, ids: Ids) -> dict[str, Tensor]:
        """The output 's d' of every layer but the head, by the layer's name. A batch: 'b s d'.

        `blocks.3` is the residual stream behind the fourth block; `final_norm`, if there is one, is what the head reads.
        """
        passed, found = self._batch(ids), {}
        for layer, call in self.module.steps[:-1]:
            passed = call(passed)
            found[layer.name] = _result(passed, ids)
        return found

    @torch.inference_mode()
    def attention(self, ids: Ids, layer: str | int) -> Tensor:
        """The attention probabilities 'h s s' (query head, query, key) of a block, `3` or `blocks.3`. A batch: 'b h s s'.

        The block's own core is called with the identity as values, so that this is what a `core_class` of a variant.py does, too. A
        Mistake if the block has no `attention.core`, or does not call it.
        """
        name = f"blocks.{layer}" if isinstance(layer, int) else layer
        blocks = [layer.name for layer, _ in self.module.steps if layer.is_block]
        if name not in blocks:
            raise Mistake(f"{name} is not a block of {self.folder.title} → use {nearest(name, blocks) or listed(blocks)}")
        core = next((part for path, part in self.module.named_modules() if path == f"{name}.attention.core"), None)
        if core is None:
            raise Mistake(f"{name} has no attention.core, whose probabilities could be read → use a block with an Attention and its core")
        found: list[Tensor] = []
        hook = core.register_forward_pre_hook(lambda core, inputs: found.append(_probabilities(core.forward, inputs)))
        try:
            self.module(self._batch(ids))
        finally:
            hook.remove()
        if not found:
            raise Mistake(f"{name}.attention does not call its core → let its forward call self.core, or write a core_class instead")
        return _result(found[0], ids)

    def generate(
        self, prompt: str, max_new_tokens: int | None = None, seed: int = 0, stop: str | Iterable[str] = (), **sampling: Any
    ) -> str:
        """The text that follows `prompt`. `sampling`: temperature, top_k, top_p, min_p, repetition_penalty; greedy without any.

        The same arguments give the same text, which is that of `python -m research generate` with --seed for its first text.
        """
        return "".join(self.stream(prompt, max_new_tokens, seed, stop, **sampling))

    def stream(
        self, prompt: str, max_new_tokens: int | None = None, seed: int = 0, stop: str | Iterable[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """The pieces of the text of `generate`, as they become certain. One stream at a time: a later text ends an unfinished stream.

        The ended stream raises a Mistake when it is continued.
        """
        room = self._generator.context - len(self.tokenizer.prompt(prompt))
        tokens = max(1, min(DEFAULT_TOKENS, room)) if max_new_tokens is None else max_new_tokens
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        settings = GenerationSettings(tokens, SamplingParams(**sampling), text_seed(seed, 0, 0), stops)
        self._generator.clear()
        text = self._generator.submit(prompt, settings)
        while text.finish is None:
            if text in self._generator.step():
                yield text.fresh
        if text.finish == CANCELLED:
            raise Mistake("this stream was ended by a later text of the same model → read one stream to its end, or load the model twice")

    @cached_property
    def _generator(self) -> TextGenerator:
        """A decoder. It has a module of its own, whose weights are packed for decoding. A warning says why there is no KV cache."""
        decoder = self._spec.on(Grid())
        if decoder.uncached:
            warnings.warn(decoder.uncached, stacklevel=4)  # at the caller of `stream`
        return TextGenerator(decoder, self.tokenizer, self.config, self._spec.context, ends_of(self.tokenizer, ROOT))

    def _batch(self, ids: Ids) -> Tensor:
        """The ids as 'b s' on the module's device. A Mistake if they are no ids of this model, or too many."""
        batch = torch.as_tensor(ids, dtype=torch.int64)
        if batch.dim() not in (1, 2) or batch.shape[-1] == 0:
            raise Mistake(f"ids have the shape {tuple(batch.shape)} → use a sequence 's' or a batch 'b s' with at least one id each")
        if not 0 <= int(batch.min()) <= int(batch.max()) < self.config.vocab_size:
            raise Mistake(f"ids lie in {int(batch.min())}…{int(batch.max())}, model.vocab_size = {self.config.vocab_size} → use encode")
        if self.config.position == "learned" and batch.shape[-1] > self.config.seq_length:
            raise Mistake(f"{batch.shape[-1]} ids are more than the learned positions, {self.config.seq_length} → use fewer")
        return torch.atleast_2d(batch).to(next(self.module.parameters()).device)


def _result(values: Tensor, ids: Ids) -> Tensor:
    """'b …' on the CPU, at least fp32; '…' if `ids` were one sequence."""
    values = values.to("cpu", torch.promote_types(values.dtype, torch.float32))
    return values if isinstance(ids, Tensor) and ids.dim() == 2 else values[0]


def _probabilities(core: Call, inputs: tuple[Any, ...]) -> Tensor:
    """'b h s s': what an attention core does to the values, from its output for the identity as values."""
    q, k, v, *rest = inputs
    identity = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
    return core(q, k, identity, *rest)
