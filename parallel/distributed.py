"""Brings torch.distributed up and down for a rank. One of the few places that touch os.environ."""
# MERGED-DOC """Keeps DeepSpeed from talking while it builds, unless it has something to warn of."""

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
"""The logger whose level says how much is told: DEBUG lets everything through."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's INFO lines and bare prints do not reach the terminal inside; warnings and errors do."""
    if logging.getLogger(LOGGER).isEnabledFor(logging.DEBUG):
        yield
        return
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective may wait for a rank before it fails."""


def device() -> torch.device:
    """This rank's device: the current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(rank: int, world: int, local_rank: int, rendezvous: str | None) -> None:
    """Joins the world as `meet` does, and DeepSpeed with it, which finds the group initialised and uses it."""
    os.environ["LOCAL_RANK"] = str(local_rank)  # read by DeepSpeed's PipelineModule and accelerator
    _compile_nothing()
    meet(rank, world, local_rank, rendezvous)
    _join_deepspeed(dist.get_backend())


def meet(rank: int, world: int, local_rank: int, rendezvous: str | None) -> None:
    """Joins the world through `rendezvous` ("tcp://host:port" or "file://path"; None: a world of one, which needs neither).

    NCCL where CUDA is present (not run), gloo elsewhere. Without DeepSpeed, whose import takes seconds: for what trains nothing.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    arguments: dict = {"backend": "nccl" if cuda else "gloo", "rank": rank, "world_size": world, "timeout": TIMEOUT}
    if rendezvous is None:
        dist.init_process_group(store=dist.HashStore(), **arguments)
    else:
        dist.init_process_group(init_method=rendezvous, **arguments)


def stop() -> None:
    """Leaves the world; harmless where it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_deepspeed(backend: str) -> None:
    """DeepSpeed's own communication layer over the group just made; without it PipelineModule cannot be built."""
    import deepspeed

    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, once per collective and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    with quiet():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _compile_nothing() -> None:
    """DeepSpeed's init would JIT-compile a shared-memory collective for minutes; nothing here uses it."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
