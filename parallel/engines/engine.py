"""The one place that builds and drives DeepSpeed engines: one interface, a plain engine (ZeRO 1–3) and a pipeline engine.

Both take the same micro-batches and return the same global token means; which one runs is decided by the grid alone.
"""
# MERGED-DOC """What is seen of a live engine's logits, on every rank: scores and next tokens in the middle of training, without a trace in it."""
# MERGED-DOC """From numpy, which research/data speaks, to torch, which the engines speak."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from parallel.distributed import device, quiet
from parallel.engines import fp16
from parallel.engines.deepspeed_config import EngineSettings, derive
from parallel.engines.pipeline import LogitsFunction, LogitsHook, Mpu, Pipeline, instead_of_loss, reduce_tied_accumulated
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import CallHook, Layer, PlainModule, unique_parameters
from parallel.slices import gathered, slice_of
from research.data.batches import Batch


def everywhere(seen: Tensor | None, shape: Sequence[int], grid: Grid, device: torch.device) -> Tensor:
    """'…' of `shape` on the last stage of each data rank, None before it -> 'data …' in fp32, equal on every rank. Collective.

    A broadcast along the pipe axis, then an all-gather along the data axis: every rank is in one group of each, and all issue the two
    in this order, on the current stream. Run on gloo; NCCL takes the same calls, and makes a group's communicator at its first use.
    """
    mine = torch.empty(tuple(shape), device=device) if seen is None else seen.to(torch.float32).contiguous()
    if tuple(mine.shape) != tuple(shape):
        raise ValueError(f"what is seen has the shape {tuple(mine.shape)}, {tuple(shape)} was announced")
    if grid.pipe_group is not None:
        dist.broadcast(mine, src=dist.get_process_group_ranks(grid.pipe_group)[-1], group=grid.pipe_group)
    if grid.data_group is None:
        return mine.unsqueeze(0)
    pieces = [torch.empty_like(mine) for _ in range(grid.data)]
    dist.all_gather(pieces, mine, group=grid.data_group)
    return torch.stack(pieces)


class MicroBatch(NamedTuple):
    """What one pass reads: ids 'b s' int64, targets 'b s' int64, weights 'b s' fp32 (research/data/batches.py defines them).

    `context`: integer tensors that travel beside x through all layers, e.g. the samples' numbers 'b' for dropout.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    context: tuple[Tensor, ...] = ()

    def on(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""
        ids, targets, weights = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.targets, self.weights))
        return MicroBatch(ids, targets, weights, tuple(tensor.to(device, non_blocking=True) for tensor in self.context))

    def inputs(self) -> Tensor | tuple[Tensor, ...]:
        """What the first layer takes."""
        return (self.ids, *self.context) if self.context else self.ids


Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
"""(logits, (targets, weights)) -> Σ weights · loss, a 0-dim tensor."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """What training needs of an engine. Every method is called by all ranks together (collective)."""

    fixed_shape = False
    """Whether every micro-batch must have the shape of the training ones."""

    def __init__(self, layers: Sequence[Layer], loss: Loss, grid: Grid, settings: EngineSettings) -> None:
        refuse_precision(settings.precision)
        self.grid, self.settings, self.loss, self.device = grid, settings, loss, device()
        self.config = derive(settings, cuda=self.device.type == "cuda")
        self.module = self._build_module(layers)
        self.parameters = dict(unique_parameters(self.module))
        """This rank's parameters by logical name."""
        with quiet():
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=self.module, model_parameters=_decay_groups(self.parameters.values(), settings), config=self.config, mpu=self._mpu()
            )
        fp16.correct(self.optimizer, settings.precision, grid.data)

    def train_batch(self, batches: Iterable[MicroBatch], lr: float) -> float:
        """One optimizer step at learning rate `lr` on the step's `settings.micro_batches` micro-batches of this data rank.

        Returns the step's loss before the update: the mean over unmasked tokens of the global batch, equal on every rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self._train(iter(batches))

    def evaluate_batch(self, batch: MicroBatch) -> float:
        """The loss of one micro-batch per data rank, averaged over data ranks; equal on every rank. No gradients, no update."""
        raise NotImplementedError

    def observe(self, batch: MicroBatch, look: LogitsFunction, shape: Sequence[int]) -> Tensor:
        """What `look` sees in the logits of one micro-batch per data rank: 'data …' fp32, `shape` each, equal on every rank.

        No dropout, no gradients, and no trace: what is trained afterwards is the same, bit for bit. `look` is called on the last stage.
        Ids need not fill the training micro-batch's shape unless `fixed_shape`; every data rank's have one shape.
        """
        with torch.no_grad():
            return everywhere(self._looked(batch, look), shape, self.grid, self.device)

    def gradient_norm(self) -> float:
        """2-norm of the last step's whole gradient before clipping: unique parameters, all ranks; equal on every rank."""
        norm = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was not applied because a gradient was not finite."""
        return int(self.deepspeed.skipped_steps)

    @property
    def loss_scale(self) -> float:
        """What the next step multiplies its loss by before the backward pass, in fp16; equal on every rank and every layout. Else 1."""
        return self._gradient_scale() * self.grid.data if self.settings.precision == "fp16" else 1.0

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole fp32 master weight on the CPU) of this stage's parameters, in the order of the layers.

        Collective over data and tensor ranks, one parameter at a time, so that memory stays bounded by the largest. A tied table
        comes from the stage whose layer owns it, not from the one that holds a copy.
        """
        for name, parameter in self.parameters.items():
            if not self.owns(name):
                continue
            cut = slice_of(parameter)
            piece = safe_get_full_fp32_param(parameter).detach().to(self.device, torch.float32)  # offloaded ones come from the host
            yield name, gathered(piece.view(cut.local_shape(self.grid.tensor)), cut, self._cut_group(parameter)).cpu()

    def watch_layers(self, watcher: CallHook) -> None:
        """From now on each layer of this stage is called through `watcher(name, call)`. For verification."""
        self.module.watch(watcher)

    def watch_gradients(self, see: Callable[[dict[str, Tensor]], None]) -> None:
        """From now on `see` gets every step's gradients before the update: whole, unclipped, fp32, by logical name, of this stage.

        Collective in every step, and slow: for verification, not for training.
        """
        update = self.optimizer.step

        def step(*arguments: Any, **settings: Any) -> Any:
            see(dict(self._full_gradients()))
            return update(*arguments, **settings)

        self.optimizer.step = step

    def _full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        scale = self._gradient_scale()
        for name, parameter in self.parameters.items():
            if self.owns(name):
                cut = slice_of(parameter)
                piece = safe_get_full_grad(parameter).detach().to(self.device, torch.float32) / scale
                yield name, gathered(piece.view(cut.local_shape(self.grid.tensor)), cut, self._cut_group(parameter)).cpu()

    def _gradient_scale(self) -> float:
        """What DeepSpeed's reduced gradients are still multiplied by."""
        return float(self.optimizer.loss_scale) if self.settings.precision == "fp16" else 1.0

    def owns(self, name: str) -> bool:
        """Whether a parameter is this stage's own, not its copy of another's tied table."""
        return True

    def _cut_group(self, parameter: Tensor) -> Any:
        return self.grid.tensor_group if slice_of(parameter).dim is not None else None

    def _build_module(self, layers: Sequence[Layer]) -> nn.Module:
        raise NotImplementedError

    def _mpu(self) -> Any:
        raise NotImplementedError

    def _train(self, batches: Iterator[MicroBatch]) -> float:
        raise NotImplementedError

    def _looked(self, batch: MicroBatch, look: LogitsFunction) -> Tensor | None:
        """`look(logits)`; None on a rank that has no logits."""
        raise NotImplementedError


class PlainEngine(Engine):
    """pipe = 1: the plain module on DeepSpeedEngine, ZeRO 1, 2 or 3, with or without offload."""

    def _build_module(self, layers: Sequence[Layer]) -> nn.Module:
        mpu = self._mpu()
        sharded = self.config["zero_optimization"]["stage"] == 3
        group = mpu.get_data_parallel_group()
        with quiet(), deepspeed.zero.Init(data_parallel_group=group, mpu=mpu, config_dict_or_path=self.config, enabled=sharded):
            return PlainModule(layers)

    def _mpu(self) -> Mpu:
        if not hasattr(self, "_made_mpu"):
            self._made_mpu = Mpu(self.grid)
        return self._made_mpu

    def _train(self, batches: Iterator[MicroBatch]) -> float:
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.settings.micro_batches):
            loss = self._forward(next(batches))
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        return self._mean_over_data(total / self.settings.micro_batches)

    def evaluate_batch(self, batch: MicroBatch) -> float:
        """See Engine."""
        self.deepspeed.eval()
        with torch.no_grad():
            loss = self._forward(batch)
        return self._mean_over_data(loss)

    def _looked(self, batch: MicroBatch, look: LogitsFunction) -> Tensor:
        self.deepspeed.eval()
        return look(self.deepspeed(batch.on(self.device).inputs()))

    def _forward(self, batch: MicroBatch) -> Tensor:
        here = batch.on(self.device)
        return self.loss(self.deepspeed(here.inputs()), (here.targets, here.weights))

    def _mean_over_data(self, value: Tensor) -> float:
        mean = value.clone()
        if self.grid.data_group is not None:
            dist.all_reduce(mean, group=self.grid.data_group)
        return float(mean / self.grid.data)


class PipeEngine(Engine):
    """pipe > 1: the layers on PipelineEngine, ZeRO-1, 1F1B."""

    fixed_shape = True  # DeepSpeed's buffers are made once

    def __init__(self, layers: Sequence[Layer], loss: Loss, grid: Grid, settings: EngineSettings) -> None:
        super().__init__(layers, loss, grid, settings)
        reduce_tied_accumulated(self.deepspeed)

    def _build_module(self, layers: Sequence[Layer]) -> nn.Module:
        with quiet():
            return Pipeline(layers, self.loss, self.grid)

    def owns(self, name: str) -> bool:
        """See Engine."""
        return any(name.startswith(f"{layer}.") for layer in self.module.own_layers)

    def _mpu(self) -> None:
        return None  # the PipelineModule carries its own grid

    def _train(self, batches: Iterator[MicroBatch]) -> float:
        return float(self.deepspeed.train_batch(_pairs(batches)))

    def evaluate_batch(self, batch: MicroBatch) -> float:
        """See Engine. Shapes equal the training micro-batch's, which DeepSpeed's buffers are made for."""
        loss = self.deepspeed.eval_batch(_pairs(iter([batch])), num_micro_batches=1)
        return float(loss)

    def _looked(self, batch: MicroBatch, look: LogitsFunction) -> Tensor | None:
        kept = LogitsHook(look)
        with instead_of_loss(self.module, kept):
            self.deepspeed.eval_batch(_pairs(iter([batch])), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return kept.seen


def make_engine(layers: Sequence[Layer], loss: Loss, grid: Grid, settings: EngineSettings) -> Engine:
    """The engine for this grid: a pipeline where pipe > 1, else the plain one. Collective; torch.distributed must be up."""
    return (PipeEngine if grid.pipe > 1 else PlainEngine)(layers, loss, grid, settings)


def refuse_precision(precision: str) -> None:
    """fp16 needs a device with fp16 kernels; never replaced by another precision silently."""
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise Mistake(f"precision = 'fp16' needs fp16 kernels, which this device ({device().type}) has not → use 'bf16' or 'fp32'")


def _pairs(batches: Iterator[MicroBatch]) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """What DeepSpeed's pipeline reads: (inputs of the first stage, labels of the last)."""
    for batch in batches:
        yield batch.inputs(), (batch.targets, batch.weights)


def _decay_groups(parameters: Iterable[nn.Parameter], settings: EngineSettings) -> list[dict[str, Any]]:
    """Matrices and tables decay; vectors (biases, norm weights) do not, as in GPT-2 and Megatron-LM.

    Decided on the logical shape: under ZeRO-3 the local one is empty. Every stage holds a block, hence the same groups, without
    which ZeRO-1 hangs (deepspeedai/DeepSpeed#1522).
    """
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        decayed[len(slice_of(parameter).shape) >= 2].append(parameter)
    decay = {True: settings.weight_decay, False: 0.0}
    return [{"params": found, "weight_decay": decay[matrix]} for matrix, found in decayed.items() if found]


def micro_batch(batch: Batch, numbered: bool = False) -> MicroBatch:
    """The same arrays as tensors, memory shared; the samples' numbers go along as context where the model drops anything."""
    ids, targets, weights, samples = (torch.from_numpy(array) for array in batch)
    return MicroBatch(ids, targets, weights, context=(samples,) if numbered else ())
