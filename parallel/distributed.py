"""Initialises torch.distributed and DeepSpeed for a rank, and shuts them down. One of the few modules that touch os.environ."""

import contextlib
import datetime
import io
import logging
import os
import socket
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from parallel.errors import SharedMistake

LOCAL_RANK = "LOCAL_RANK"
LOGGER = "tessera"
"""Name of the logger whose level decides how much is shown: DEBUG shows everything, DeepSpeed's own messages included."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that an experiment can name -> torch's dtypes."""
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective may wait for a rank before it fails. A slow checkpoint may take longer than torch's 10 minutes for NCCL."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Device -> backends of the process groups. NCCL exchanges the GPUs' tensors; objects and flags travel in host memory, over gloo."""


def device() -> torch.device:
    """This rank's device: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def init_process_group(rank: int, world: int, local_rank: int, rendezvous: str | dist.Store | None) -> None:
    """Joins the world through `rendezvous`: a store, "tcp://host:port", "file://path", or None for a world of one, which needs none.

    DeepSpeed is not imported, which takes seconds: processes that do not train need nothing else. No device is bound to the group
    (`device_id`): NCCL would then make every later group by splitting the communicator of all ranks, those outside of it included.
    On GPUs (not run) a SharedMistake is raised on every rank if two ranks use the same one.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(gpu_index(local_rank, torch.cuda.device_count()))
    arguments: dict = {"backend": BACKENDS["cuda" if cuda else "cpu"], "rank": rank, "world_size": world, "timeout": TIMEOUT}
    if rendezvous is None:
        dist.init_process_group(store=dist.HashStore(), **arguments)
    elif isinstance(rendezvous, dist.Store):
        dist.init_process_group(store=rendezvous, **arguments)
    else:
        dist.init_process_group(init_method=rendezvous, **arguments)
    if cuda and world > 1:
        refuse_shared_gpus(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))


def gpu_index(local_rank: int, visible: int) -> int:
    """The number of a rank's GPU among the `visible` ones of its process: the local rank, if every rank sees all GPUs of its node.

    Under `srun --gpus-per-task=N` each rank sees its own N only, numbered from 0, and any of them will do.
    """
    return local_rank % visible


def refuse_shared_gpus(own: str) -> None:
    """Raises a SharedMistake on every rank if two ranks use the same GPU; `own` identifies this rank's in the world. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), own))
    users = defaultdict(list)
    for rank, gpu in enumerate(everyone):
        users[gpu].append(rank)
    for (host, _), ranks in users.items():
        if len(ranks) > 1:
            raise SharedMistake(
                f"ranks {', '.join(map(str, ranks))} use the same GPU of {host}, but each rank needs one of its own → start as many ranks "
                "per node as it has GPUs; under srun, each task must see all GPUs or one of its own (--gpus-per-task=1)",
                reports=dist.get_rank() == 0,
            )


def start(rank: int, world: int, local_rank: int, rendezvous: str | dist.Store | None) -> None:
    """Joins the world as `init_process_group` does, then initialises DeepSpeed's own communication layer over the same group.

    Without that layer DeepSpeed's PipelineModule cannot be built.
    """
    # Read by DeepSpeed's engines, PipelineModule and ZeRO-3, which take it for the number of this rank's GPU.
    os.environ[LOCAL_RANK] = str(gpu_index(local_rank, torch.cuda.device_count()) if torch.cuda.is_available() else local_rank)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's init would JIT-compile a shared-memory collective for minutes; nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init_process_group(rank, world, local_rank, rendezvous)
    # DeepSpeed 0.19.8 calls functions that torch 2.13 has renamed, once per collective and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    with quiet():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    # DeepSpeed's own groups exchange tensors of this rank's device only, and would have torch's default timeout.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=TIMEOUT, backend="nccl" if torch.cuda.is_available() else "gloo")


def use_deterministic_kernels() -> None:
    """From now on torch uses only GPU kernels that add in a fixed order, and raises where there is none. Does nothing on a CPU.

    cuBLAS reads its workspace's size when it is first used, so this must be called before anything is computed on the GPU.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory, and filling it costs time


def backend_versions() -> list[str]:
    """['gloo'] on a CPU, ['nccl 2.27.3', 'gloo'] on a GPU: what carries collectives between ranks."""
    return [f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}", "gloo"] if torch.cuda.is_available() else ["gloo"]


def device_name() -> str:
    """'cpu', or name and memory of this rank's GPU, and how many it sees: 'NVIDIA H200, 150.1 GB, 8 GPUs visible'."""
    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    count = torch.cuda.device_count()
    return f"{properties.name}, {properties.total_memory / 1e9:.1f} GB" + (f", {count} GPUs visible" if count > 1 else "")


def stop() -> None:
    """Destroys the process groups; does nothing if there are none.

    LOCAL_RANK goes too, unless a launcher has set it: libraries that are used later in the process would take it for a launcher's.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        if "RANK" not in os.environ:
            os.environ.pop(LOCAL_RANK, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides DeepSpeed's INFO lines and prints inside the `with` block, unless our logger is at DEBUG.

    Warnings and errors are shown, except for the warning that an optimizer of the experiment's own is not DeepSpeed's.
    """
    if logging.getLogger(LOGGER).isEnabledFor(logging.DEBUG):
        yield
        return
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    logger.addFilter(_is_unexpected)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(_is_unexpected)
        logger.setLevel(level)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """A filter of log records that drops "You are using ZeRO with an untested optimizer": the tests and `verify` try such optimizers."""
    return "untested optimizer" not in record.getMessage()
