"""Records every collective that a rank issues: which operation, along which axis, how many bytes, from which line, for which layer.

`Ledger` intercepts torch's dispatch to the communication backend, so that DeepSpeed's own collectives are recorded like ours and no call
has to change. Each one is recorded *before* it is issued: if a rank hangs, its last collective is in the record. `TimedLedger` records the
same calls together with the time that they take.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.grid import Grid

OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
}
"""torch's dispatched names -> the usual names. A name that is missing here is kept as it is."""
METHODS = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), "all_reduce"),
    **dict.fromkeys(("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base"), "all_gather"),
    **dict.fromkeys(("all_gather_single", "all_gather_single_coalesced"), "all_gather"),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base"), "reduce_scatter"),
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_single_coalesced"), "reduce_scatter"),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single"), "all_to_all"),
    **{name: name for name in ("broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier")},
}
"""The methods of torch's process groups -> the usual names."""
SENT = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Multiples of (n − 1)/n of the whole tensor that each of n ranks sends on a ring. A point-to-point send sends its tensor once."""
FEW = 5
"""An all-reduce of fewer numbers than this is not counted as a tensor of the model."""
OURS = str(Path(__file__).resolve().parent.parent)
WRAPPERS = ("parallel/ledger.py", "deepspeed/comm/torch.py", "deepspeed/comm/comm.py", "deepspeed/utils/nvtx.py", "typing_extensions.py")
"""Files that only wrap collectives: the caller is further out in the stack."""
TORCH = str(Path(torch.__file__).resolve().parent)


class Entry(NamedTuple):
    """One collective as one rank issued it."""

    operation: str
    axis: str
    """The grid's axes along which the group's ranks differ: "tensor", "data", "pipe", "pipe × data"."""
    ranks: tuple[int, ...]
    """Global ranks of the group; of a send or recv: (from, to)."""
    elements: int
    """Elements of the whole tensor: the output of an all-gather, the input of a reduce-scatter."""
    dtype: str
    layer: str
    """The layer being computed: embedding, blocks.0, …, loss; empty between layers."""
    direction: str
    """forward or backward; empty between layers."""
    site: str
    """file:line of the innermost caller outside of torch; relative to the repository for our own files."""

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.elements * getattr(torch, self.dtype).itemsize

    @property
    def sent(self) -> float:
        """Bytes that this rank sends, if the collective runs on a ring."""
        if self.operation in SENT:
            return SENT[self.operation] * self.bytes * (len(self.ranks) - 1) / len(self.ranks)
        return float(self.bytes if self.operation == "send" else 0)

    def __str__(self) -> str:
        where = f" ({self.layer}, {self.direction})" if self.layer else ""
        return f"{self.operation} of {self.elements} {self.dtype} at {self.site}{where}"


class LayerRecord:
    """What a record of collectives has in common: the layer that is being computed, and the entry of one call."""

    def __init__(self, grid: Grid, see: Callable[[Entry], None]) -> None:
        super().__init__()
        self.grid, self.see = grid, see
        self.layer = self.direction = ""

    def within(self, layer: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `call`: collectives during its forward and backward pass are recorded as those of `layer`."""

        def watched(*inputs: Any, **context: Any) -> Any:
            self.layer, self.direction = layer, "forward"
            y = call(*inputs, **context)
            self.layer = self.direction = ""
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(enter_backward)
            return y

        def enter_backward(gradient: Tensor) -> None:  # called when y's gradient is complete, before the layer's own backward pass
            self.layer, self.direction = layer, "backward"

        return watched

    def between_steps(self) -> None:
        """Ends the current layer: the collectives that follow belong to none."""
        self.layer = self.direction = ""

    def _note(self, operation: str, group: dist.ProcessGroup, arguments: Sequence[Any]) -> bool:
        """Records a call with these arguments, as torch's functions have them; False for a group of one rank, which is left out."""
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return False
        if operation in ("send", "recv"):
            there, here = ranks[next(a for a in arguments if isinstance(a, int))], self.grid.rank
            ranks = (here, there) if operation == "send" else (there, here)
        # The whole tensor: an all-gather's outputs, a reduce-scatter's inputs, else the first argument.
        tensors = [] if operation == "barrier" else _flat(arguments[1] if operation == "reduce_scatter" else arguments[0])
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "uint8"
        elements = sum(tensor.numel() for tensor in tensors)
        self.see(Entry(operation, axis_of(self.grid, ranks), ranks, elements, dtype, self.layer, self.direction, _site()))
        return True


class Ledger(LayerRecord, TorchDispatchMode):
    """Inside `with ledger: …`, `see` receives every collective of this rank in the order of issue. Groups of one rank are left out.

    The backward pass is recorded if it runs in the thread that called it, as on the CPU. Whether CUDA's autograd threads inherit
    the dispatch mode was not run.
    """

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), settings: dict | None = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            groups = [a for a in arguments if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a)]
            if not groups:
                raise ValueError("a collective without a process group")
            self._note(OPERATIONS.get(name, name), dist.ProcessGroup.unbox(groups[0]), arguments)
        return function(*arguments, **(settings or {}))


class TimedLedger(LayerRecord):
    """Inside `with ledger: …`, keeps every collective of this rank, and how long its thread issued it and waited for it.

    It stands around the methods of torch's process groups, which all of torch's and DeepSpeed's functions call. Unlike a `Ledger`, it does
    not see the other operations of a step, and so does not slow them down. With gloo, its seconds are what communication takes from the
    step. NCCL's calls return at once: there, the time of the collectives is that of their kernels in torch's trace (not run).
    """

    def __init__(self, grid: Grid) -> None:
        self.entries: list[Entry] = []
        self.seconds: list[float] = []
        """Of each entry."""
        self._issued: dict[int, tuple[Any, int]] = {}
        """The collectives that were not waited for yet, by the identity of torch's handle -> (the handle, the number of the entry)."""
        self._originals: list[tuple[type, str, Any]] = []
        super().__init__(grid, self.entries.append)

    def __enter__(self) -> "TimedLedger":
        for name, operation in METHODS.items():
            if (method := vars(dist.ProcessGroup).get(name)) is not None:
                self._replace(dist.ProcessGroup, name, self._timed_issue(operation, method))
        self._replace(dist.Work, "wait", self._timed_wait(vars(dist.Work)["wait"]))
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._originals:
            owner, name, method = self._originals.pop()
            setattr(owner, name, method)
        self._issued.clear()

    def _replace(self, owner: type, name: str, method: Any) -> None:
        self._originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, method)

    def _timed_issue(self, operation: str, method: Any) -> Callable[..., Any]:
        def issue(group: dist.ProcessGroup, *arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            noted = self._note(operation, group, arguments)
            work = method(group, *arguments, **settings)
            if noted:
                self._issued[id(work)] = work, len(self.seconds)
                self.seconds.append(time.perf_counter() - began)
            return work

        return issue

    def _timed_wait(self, method: Any) -> Callable[..., Any]:
        def wait(work: Any, *arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(work, *arguments, **settings)
            finally:
                _, entry = self._issued.pop(id(work), (None, None))
                if entry is not None:
                    self.seconds[entry] += time.perf_counter() - began

        return wait


def _flat(value: Any) -> list[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value for tensor in _flat(inner)] if isinstance(value, (list, tuple)) else []


def axis_of(grid: Grid, ranks: Sequence[int]) -> str:
    """The axes along which these global ranks of the grid differ: "tensor", "pipe × tensor"."""
    places = [Grid(grid.pipe, grid.data, grid.tensor, rank) for rank in ranks]
    return " × ".join(axis for axis in ("pipe", "data", "tensor") if len({getattr(place, f"{axis}_rank") for place in places}) > 1)


def bookkeeping(entry: Entry) -> bool:
    """Whether a collective carries no tensor of the model but norms, flags, counters or sample numbers. Left out of sums of bytes."""
    few = entry.operation in ("all_reduce", "broadcast") and entry.elements < FEW
    return few or not getattr(torch, entry.dtype).is_floating_point


def _site() -> str:
    """file:line of the collective's caller: the innermost frame that is neither in torch nor in a wrapper around it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(TORCH) and not file.endswith(WRAPPERS):
            relative = file.partition("site-packages/")[2] or file.removeprefix(f"{OURS}/")
            return f"{relative}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def first_difference(records: Sequence[Sequence[Entry]]) -> str | None:
    """A sentence about the first collective in which ranks differ that must issue the same ones; None if all agree.

    `records[rank]` is in the order of issue. The members of a group are compared call by call; for a pair of ranks, the sends of one
    with the receives of the other.
    """
    sequences: dict[tuple[str, tuple[int, ...]], dict[int, list[Entry]]] = defaultdict(dict)
    for rank, entries in enumerate(records):
        for entry in entries:
            kind = "pair" if entry.operation in ("send", "recv") else "group"
            sequences[kind, entry.ranks].setdefault(rank, []).append(entry)
    differences = [text for (_, ranks), by_rank in sequences.items() if (text := _difference(ranks, by_rank))]
    return min(differences, default=None, key=lambda text: ("issued nothing" in text, text))  # a mismatch explains more than a missing call


def _difference(ranks: tuple[int, ...], by_rank: dict[int, list[Entry]]) -> str | None:
    columns = [by_rank.get(rank, []) for rank in ranks]
    for i, row in enumerate(zip_longest(*columns)):
        kinds = {None if entry is None else (_kind(entry), entry.elements, entry.dtype) for entry in row}
        if len(kinds) > 1:
            calls = "; ".join(f"rank {rank}: {entry or 'issued nothing'}" for rank, entry in zip(ranks, row, strict=True))
            return f"ranks {', '.join(map(str, ranks))} differ at their call {i + 1} to each other: {calls}"
    return None


def _kind(entry: Entry) -> str:
    return "point to point" if entry.operation in ("send", "recv") else entry.operation
