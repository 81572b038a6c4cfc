"""Our grid and layers in DeepSpeed's terms: an `mpu` for its plain engine, a PipelineModule for its pipeline engine."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.distributed import TIMEOUT
from parallel.grid import Grid
from parallel.layers import CallHook, Layer, apply_layer, stage_bounds

LogitsFunction = Callable[[Tensor], Tensor]
"""logits 'b s v', this rank's rows of the vocabulary -> a tensor that is equal on every tensor rank. Collective over tensor ranks."""


class Mpu:
    """Our Grid with the interface of Megatron's mpu, as DeepSpeedEngine calls it at pipe = 1.

    "Model parallel" means pipe × tensor there. It defines no `get_sequence_*`, which would switch on DeepSpeed's sequence parallelism.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        alone = None
        if None in (grid.data_group, grid.model_group):
            # A group of this rank alone needs nobody else. Created by all ranks, it would take a barrier of the world per rank.
            alone = dist.new_group([grid.rank], timeout=TIMEOUT, use_local_synchronization=True)
        self.data_group, self.model_group = grid.data_group or alone, grid.model_group or alone

    def get_data_parallel_rank(self) -> int:
        """This rank's share of the batch."""
        return self.grid.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of data ranks."""
        return self.grid.data

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that hold the same slice of the same stage."""
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data_group)

    def get_model_parallel_rank(self) -> int:
        """Rank within one replica of the model."""
        return self.grid.pipe_rank * self.grid.tensor + self.grid.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks of one replica."""
        return self.grid.pipe * self.grid.tensor

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.model_group

    # At pipe = 1 the ranks of a replica are the tensor ranks.
    get_tensor_model_parallel_rank = get_slice_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group = get_model_parallel_group


class Spec(LayerSpec):
    """A Layer as DeepSpeed's LayerSpec, whose own constructor requires a class where ours takes any callable."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.typename, self.global_rank = layer, nn.Module, dist.get_rank()

    def __repr__(self) -> str:
        return self.layer.name

    def build(self, log: bool = False) -> nn.Module:
        return self.layer.build()


class Pipeline(PipelineModule):
    """PipelineModule over our list of layers, cut by `stage_bounds` instead of DeepSpeed's partitioner."""

    def __init__(self, layers: Sequence[Layer], loss: Any, grid: Grid) -> None:
        object.__setattr__(self, "named_layers", list(layers))  # before nn.Module is ready for attributes
        object.__setattr__(self, "bounds", stage_bounds(layers, grid.pipe))
        topology = PipeModelDataParallelTopology(num_pp=grid.pipe, num_mp=grid.tensor, num_dp=grid.data)
        super().__init__(layer_specs(layers), topology=topology, loss_fn=loss)
        self.own_layers = [layer.name for layer in layers[self.bounds[grid.pipe_rank] : self.bounds[grid.pipe_rank + 1]]]
        # DeepSpeed's gradient norm calls this method of its grid, and that grid lacks it.
        self._grid.get_tensor_model_parallel_group = self._grid.get_slice_parallel_group

    def _build(self) -> None:
        super()._build()
        layers = self.named_layers[self._local_start : self._local_stop]
        self.forward_funcs: list[Any] = [partial(apply_layer, layer, call) for layer, call in zip(layers, self.forward_funcs, strict=True)]

    def watch(self, hook: CallHook) -> Callable[[], None]:
        """Calls this stage's layers through `hook(name, call)` until what is returned is called, the last of several hooks first."""
        before = self.forward_funcs
        self.forward_funcs = [partial(apply_layer, layer, hook(layer.name, call)) for layer, call in (f.args for f in before)]
        return lambda: setattr(self, "forward_funcs", before)

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()  # a broadcast into a leaf: with gradients on, torch warns in every backward pass

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[stage], stop=self.bounds[stage + 1])


def layer_specs(layers: Sequence[Layer]) -> list[LayerSpec]:
    """DeepSpeed's specs of the layers.

    Tied layers become TiedLayerSpecs: the last stage builds a copy of the embedding, drawn under the same name.
    """
    by_name = {layer.name: layer for layer in layers}
    owners = {layer.tied_to for layer in layers if layer.tied_to}
    specs: list[LayerSpec] = []
    for layer in layers:
        if not layer.tied_to and layer.name not in owners:
            specs.append(Spec(layer))
            continue
        owner = by_name[layer.tied_to or layer.name]
        apply = (lambda embedding, x: embedding.logits(x)) if layer.tied_to else None
        specs.append(TiedLayerSpec(owner.name, owner.make, forward_fn=apply, tied_weight_attr="weight", **owner.arguments))
    return specs


def reduce_tied_accumulated(engine: PipelineEngine) -> None:
    """Makes a pipeline sum the gradients of its tied copies where ZeRO-1 accumulates them in fp32: beside `weight.grad`.

    DeepSpeed 0.19.8 sums `weight.grad`, which is None by then (fp16), so that the copies diverge without a warning: the gradient
    norm of a tied GPT in fp16 on two stages was 2.140 instead of 2.229.
    """

    def reduce(engine: PipelineEngine) -> None:
        for weight, group in engine.module.get_tied_weights_and_groups():
            accumulated = getattr(weight, "grad_accum", None)
            if accumulated is not None:
                dist.all_reduce(accumulated, group=group)
        inherited(engine)

    inherited = engine._INSTRUCTION_MAP[ReduceTiedGrads]
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce}


class LogitsHook:
    """Replaces a pipeline's loss function during one pass: keeps `function(logits)` as `result`, and returns a loss of 0."""

    def __init__(self, function: LogitsFunction) -> None:
        self.function = function
        self.result: Tensor | None = None
        """None on every stage but the last."""

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        self.result = self.function(logits)
        # DeepSpeed adds the loss to a sum that the next training step resets.
        return torch.zeros((), device=self.result.device)


@contextlib.contextmanager
def instead_of_loss(pipeline: Any, loss: Callable[[Tensor, Any], Tensor]) -> Iterator[None]:
    """Inside the `with` block, a PipelineModule calls `loss` where it would compute its own."""
    own, pipeline.loss_fn = pipeline.loss_fn, loss
    try:
        yield
    finally:
        pipeline.loss_fn = own
