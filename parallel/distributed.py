"""Initialises torch.distributed and DeepSpeed for a rank, and shuts them down. One of the few modules that touch os.environ."""

import contextlib
import datetime
import io
import logging
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

LOGGER = "tessera"
"""Name of the logger whose level decides how much is shown: DEBUG shows everything, DeepSpeed's own messages included."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that an experiment can name -> torch's dtypes."""
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective may wait for a rank before it fails."""


def device() -> torch.device:
    """This rank's device: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def init_process_group(rank: int, world: int, local_rank: int, rendezvous: str | dist.Store | None) -> None:
    """Joins the world through `rendezvous`: a store, "tcp://host:port", "file://path", or None for a world of one, which needs none.

    The backend is NCCL if CUDA is present (not run), gloo otherwise. DeepSpeed is not imported, which takes seconds: processes that
    do not train need nothing else.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    arguments: dict = {"backend": "nccl" if cuda else "gloo", "rank": rank, "world_size": world, "timeout": TIMEOUT}
    if rendezvous is None:
        dist.init_process_group(store=dist.HashStore(), **arguments)
    elif isinstance(rendezvous, dist.Store):
        dist.init_process_group(store=rendezvous, **arguments)
    else:
        dist.init_process_group(init_method=rendezvous, **arguments)


def start(rank: int, world: int, local_rank: int, rendezvous: str | dist.Store | None) -> None:
    """Joins the world as `init_process_group` does, then initialises DeepSpeed's own communication layer over the same group.

    Without that layer DeepSpeed's PipelineModule cannot be built.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)  # read by DeepSpeed's PipelineModule and accelerator
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's init would JIT-compile a shared-memory collective for minutes; nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init_process_group(rank, world, local_rank, rendezvous)
    # DeepSpeed 0.19.8 calls functions that torch 2.13 has renamed, once per collective and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    with quiet():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def stop() -> None:
    """Destroys the process groups; does nothing if there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
