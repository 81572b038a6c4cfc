"""DeepSpeed engines behind one interface: `make_engine` builds a plain engine (ZeRO 1–3) or a pipeline engine, `Engine` drives it.

Both take the same micro-batches and return the same token means over the global batch. The grid alone decides which one runs.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from parallel.distributed import device, device_name, quiet
from parallel.engines import fp16
from parallel.engines.deepspeed_config import EngineSettings, derive
from parallel.engines.micro_batch import MicroBatch, copied_ahead
from parallel.engines.pipeline import LogitsFunction, LogitsHook, Mpu, Pipeline, instead_of_loss, reduce_tied_accumulated
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import CallHook, Layer, PlainModule, unique_parameters
from parallel.slices import gathered, slice_of

Loss = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
"""(logits, labels) -> Σ weights · loss, a 0-dim tensor. What the labels are is between the loss and the data: models.gpt.TokenLoss takes
targets and weights."""


def read_numbers(*values: Tensor) -> list[float]:
    """0-dim tensors as Python's numbers, in one copy: each copy from a GPU makes the host wait until everything before it is computed."""
    device = values[0].device
    return torch.stack([value.detach().to(device, torch.float64).reshape(()) for value in values]).tolist()


class Engine:
    """What training needs of a DeepSpeed engine. Every method is called by all ranks together (collective)."""

    fixed_shape = False
    """Whether micro-batches of another shape than the ones before cost more: `observe` then gets those of one shape."""

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Loss,
        grid: Grid,
        settings: EngineSettings,
        held_out_loss: Loss | None = None,
    ) -> None:
        """`held_out_loss` is the loss of `evaluate_batch`; None: `loss`."""
        refuse_precision(settings.precision)
        self.grid, self.settings, self.loss, self.device = grid, settings, loss, device()
        self.held_out_loss = held_out_loss or loss
        self.config = derive(settings, cuda=self.device.type == "cuda")
        self.context = layers[0].context
        """The names of the context tensors of a micro-batch that the layers read."""
        self.module, mpu = self._build_module(layers)
        self.parameters = dict(unique_parameters(self.module))
        """This rank's parameters by logical name."""
        with quiet():
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=_optimizer_maker(settings),
                model_parameters=_decay_groups(self.parameters.values(), settings),
                config=self.config,
                mpu=mpu,
            )
        self._correct_deepspeed()
        self._gradient_norm = float("nan")

    def train_batch(self, batches: Iterable[MicroBatch], lr: float, micro_batches: int | None = None) -> float:
        """One optimizer step at learning rate `lr` on the step's micro-batches of this data rank.

        They have one shape, equal on every rank, which may be another in the next step. `micro_batches`: how many there are, equal on
        every rank; None: `settings.micro_batches`. Returns the step's loss before the update: the mean over unmasked tokens of the
        global batch, equal on every rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._accumulate(micro_batches or self.settings.micro_batches)
        loss, norm = self._train(batches), self.deepspeed.get_global_grad_norm()
        # One copy from the device for both, the only one of a step besides DeepSpeed's own.
        values = read_numbers(loss, norm) if isinstance(norm, Tensor) else [*read_numbers(loss), float("nan" if norm is None else norm)]
        self._gradient_norm = values[1]
        return values[0]

    def evaluate_batch(self, batch: MicroBatch) -> float:
        """`held_out_loss` of one micro-batch per data rank, averaged over data ranks; equal on every rank. No gradients, no update."""
        raise NotImplementedError

    def observe(self, batch: MicroBatch, function: LogitsFunction, shape: Sequence[int]) -> Tensor:
        """`function(logits)` of one micro-batch per data rank, each of the shape `shape`: 'data …' fp32, equal on every rank.

        There is no dropout and no gradient, and later training is the same bit for bit. `function` is called on the last stage.
        The ids of all data ranks have one shape.
        """
        with torch.no_grad():
            return gather_from_last_stages(self._observe(batch, function), shape, self.grid, self.device)

    def gradient_norm(self) -> float:
        """2-norm of the last step's whole gradient before clipping: unique parameters, all ranks; equal on every rank."""
        return self._gradient_norm

    @property
    def skipped_steps(self) -> int:
        """Steps whose update was not applied because a gradient was not finite."""
        return int(self.deepspeed.skipped_steps)

    @property
    def loss_scale(self) -> float:
        """The factor of the next step's loss before the backward pass in fp16, equal on every rank and every layout; otherwise 1."""
        return float(self.optimizer.loss_scale) * self.grid.data if self.settings.precision == "fp16" else 1.0

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole fp32 master weight on the CPU) of this stage's parameters, in the order of the layers.

        Collective over data and tensor ranks, one parameter at a time, so that memory stays bounded by the largest. A tied table
        comes from the stage whose layer owns it, not from the one that holds a copy.
        """
        return self._gather_full(safe_get_full_fp32_param)

    def watch_gradients(self, see: Callable[[dict[str, Tensor]], None]) -> None:
        """Registers `see`, called in every step before the update with this stage's gradients: whole, unclipped, fp32, by logical name.

        Collective in every step, and slow: for verification, not for training.
        """
        update = self.optimizer.step

        def step(*arguments: Any, **settings: Any) -> Any:
            # DeepSpeed's reduced gradients are still multiplied by its loss scale.
            scale = float(self.optimizer.loss_scale) if self.settings.precision == "fp16" else 1.0
            see({name: gradient / scale for name, gradient in self._gather_full(safe_get_full_grad)})
            return update(*arguments, **settings)

        self.optimizer.step = step

    def watch_layers(self, hook: CallHook) -> Callable[[], None]:
        """Calls this rank's layers, and the loss of training as "loss", through `hook(name, call)` until what is returned is called."""
        restore, loss = self.module.watch(hook), self.loss
        self._use_loss(hook("loss", loss))

        def end() -> None:
            restore()
            self._use_loss(loss)

        return end

    def owns(self, name: str) -> bool:
        """Whether a parameter is this stage's own, and not its copy of another stage's tied table."""
        return True

    def _gather_full(self, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole fp32 tensor on the CPU) of what `read` returns for each parameter's slice. Collective."""
        for name, parameter in self.parameters.items():
            if not self.owns(name):
                continue
            cut = slice_of(parameter)
            piece = read(parameter).detach().to(self.device, torch.float32)  # offloaded ones come from the host
            group = self.grid.tensor_group if cut.dim is not None else None
            yield name, gathered(piece.view(cut.local_shape(self.grid.tensor)), cut, group).cpu()

    def _correct_deepspeed(self) -> None:
        """Mends what DeepSpeed's engine does wrong, once it is there."""
        fp16.correct(self.optimizer, self.settings.precision, self.grid.data)

    def _build_module(self, layers: Sequence[Layer]) -> tuple[Any, Mpu | None]:
        """The module on this rank, and the `mpu` that DeepSpeed takes beside it."""
        raise NotImplementedError

    def _use_loss(self, loss: Loss) -> None:
        """Sets the loss of training."""
        self.loss = loss

    def _accumulate(self, micro_batches: int) -> None:
        """Sets the number of micro-batches of the next step."""
        if micro_batches != self.deepspeed.gradient_accumulation_steps():
            self.deepspeed.set_train_batch_size(micro_batches * self.settings.micro_batch_size * self.grid.data)
            self.deepspeed.micro_steps = 0  # the step ends where this is a multiple of the number

    def _train(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The passes and the update of `train_batch`; the loss as a 0-dim tensor, which is not waited for."""
        raise NotImplementedError

    def _observe(self, batch: MicroBatch, function: LogitsFunction) -> Tensor | None:
        """`function(logits)`; None on a rank that has no logits."""
        raise NotImplementedError


class PlainEngine(Engine):
    """pipe = 1: the plain module on DeepSpeedEngine, ZeRO 1, 2 or 3, with or without offload."""

    def _build_module(self, layers: Sequence[Layer]) -> tuple[nn.Module, Mpu]:
        mpu = Mpu(self.grid)
        sharded = self.config["zero_optimization"]["stage"] == 3
        group = mpu.get_data_parallel_group()
        with quiet(), deepspeed.zero.Init(data_parallel_group=group, mpu=mpu, config_dict_or_path=self.config, enabled=sharded):
            return PlainModule(layers), mpu

    def _train(self, batches: Iterable[MicroBatch]) -> Tensor:
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        micro_batches, here = self.deepspeed.gradient_accumulation_steps(), copied_ahead(batches, self.device)
        for _ in range(micro_batches):
            loss = self._forward(next(here), self.loss)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        return self._mean_over_data(total / micro_batches)

    def evaluate_batch(self, batch: MicroBatch) -> float:
        self.deepspeed.eval()
        with torch.no_grad():
            loss = self._forward(batch, self.held_out_loss)
        return float(self._mean_over_data(loss))

    def _observe(self, batch: MicroBatch, function: LogitsFunction) -> Tensor:
        self.deepspeed.eval()
        return function(self.deepspeed(batch.on(self.device).inputs(self.context)))

    def _forward(self, batch: MicroBatch, loss: Loss) -> Tensor:
        here = batch.on(self.device)
        return loss(self.deepspeed(here.inputs(self.context)), here.labels)

    def _mean_over_data(self, value: Tensor) -> Tensor:
        mean = value.clone()
        if self.grid.data_group is not None:
            dist.all_reduce(mean, group=self.grid.data_group)
        return mean / self.grid.data


class PipeEngine(Engine):
    """pipe > 1: the layers on PipelineEngine, ZeRO-1, 1F1B."""

    fixed_shape = True  # for another shape, the buffers between stages are made anew
    _shape: torch.Size | None = None
    """Of the ids for which DeepSpeed's buffers between stages were made."""

    def _correct_deepspeed(self) -> None:
        super()._correct_deepspeed()
        reduce_tied_accumulated(self.deepspeed)

    def _build_module(self, layers: Sequence[Layer]) -> tuple[Pipeline, None]:
        with quiet():
            return Pipeline(layers, self.loss, self.grid), None  # the PipelineModule carries its own grid

    def owns(self, name: str) -> bool:
        return any(name.startswith(f"{layer}.") for layer in self.module.own_layers)

    def _use_loss(self, loss: Loss) -> None:
        self.loss = self.module.loss_fn = loss

    def _train(self, batches: Iterable[MicroBatch]) -> Tensor:
        rest = iter(batches)
        first = next(rest)  # on every stage: those in the middle read no other
        self._make_room(first)
        return self.deepspeed.train_batch(self._pairs(copied_ahead(itertools.chain([first], rest), self.device)))

    def evaluate_batch(self, batch: MicroBatch) -> float:
        self._make_room(batch)
        with instead_of_loss(self.module, self.held_out_loss):
            return float(self.deepspeed.eval_batch(self._pairs(iter([batch])), num_micro_batches=1))

    def _observe(self, batch: MicroBatch, function: LogitsFunction) -> Tensor | None:
        self._make_room(batch)
        hook = LogitsHook(function)
        with instead_of_loss(self.module, hook):
            self.deepspeed.eval_batch(self._pairs(iter([batch])), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return hook.result

    def _make_room(self, batch: MicroBatch) -> None:
        """Lets DeepSpeed make its buffers between stages anew if the next micro-batches have another shape; so does every rank."""
        if batch.ids.shape != self._shape:
            self.deepspeed.reset_activation_shape()
            self._shape = batch.ids.shape

    def _pairs(self, batches: Iterator[MicroBatch]) -> Iterator[tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """What DeepSpeed's pipeline reads: (inputs of the first stage, labels of the last stage)."""
        for batch in batches:
            yield batch.inputs(self.context), batch.labels


def make_engine(layers: Sequence[Layer], loss: Loss, grid: Grid, settings: EngineSettings, held_out_loss: Loss | None = None) -> Engine:
    """The engine for this grid: a pipeline engine if pipe > 1, else the plain one. Collective; torch.distributed must be initialised."""
    return (PipeEngine if grid.pipe > 1 else PlainEngine)(layers, loss, grid, settings, held_out_loss)


def refuse_precision(precision: str) -> None:
    """Raises a Mistake if the device has no kernels for the precision. It is never replaced by another precision silently."""
    from deepspeed.accelerator import get_accelerator

    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Mistake(f"precision = 'bf16' needs bf16 kernels, which this GPU ({device_name()}) has not → use 'fp16' or 'fp32'")
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise Mistake(f"precision = 'fp16' needs fp16 kernels, which this device ({device().type}) has not → use 'bf16' or 'fp32'")


def gather_from_last_stages(values: Tensor | None, shape: Sequence[int], grid: Grid, device: torch.device) -> Tensor:
    """'…' of `shape` on the last stage of each data rank, None on other stages -> 'data …' in fp32, equal on every rank. Collective.

    A broadcast along the pipe axis, then an all-gather along the data axis. Every rank is in one group of each, and all issue the two
    in this order, on the current stream. Run on gloo; NCCL takes the same calls, and makes a group's communicator at its first use.
    """
    own = torch.empty(tuple(shape), device=device) if values is None else values.to(torch.float32).contiguous()
    if tuple(own.shape) != tuple(shape):
        raise ValueError(f"what is seen has the shape {tuple(own.shape)}, {tuple(shape)} was announced")
    if grid.pipe_group is not None:
        dist.broadcast(own, src=dist.get_process_group_ranks(grid.pipe_group)[-1], group=grid.pipe_group)
    if grid.data_group is None:
        return own.unsqueeze(0)
    received = own.new_empty((grid.data * own.numel(),))
    dist.all_gather_single(received, own.flatten(), group=grid.data_group)
    return received.view(grid.data, *own.shape)


def _optimizer_maker(settings: EngineSettings) -> Callable[[Any], Any] | None:
    """What DeepSpeed calls with the parameter groups; None where it creates AdamW itself."""
    if settings.optimizer_class is None:
        return None
    return partial(settings.optimizer_class, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)


def _decay_groups(parameters: Iterable[nn.Parameter], settings: EngineSettings) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: matrices and tables decay; vectors (biases, norm weights) do not, as in GPT-2 and Megatron-LM.

    The logical shape decides: under ZeRO-3 the local one is empty. Every stage holds a block, hence every rank has the same groups;
    otherwise ZeRO-1 hangs (deepspeedai/DeepSpeed#1522).
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[len(slice_of(parameter).shape) >= 2].append(parameter)
    decay = {True: settings.weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": decay[is_matrix]} for is_matrix, group in groups.items() if group]
