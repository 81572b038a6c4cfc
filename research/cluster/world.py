"""Brings up torch.distributed on this rank of a launch, with its threads and log level. The first step after torch is imported."""

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.distributed as dist

from parallel import distributed
from parallel.distributed import LOGGER
from parallel.engines.engine import refuse_precision
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from research.cluster.environment import Ranks, threads_per_rank


@contextlib.contextmanager
def joined(ranks: Ranks, pipe: int, tensor: int, sequence: bool, precision: str, verbose: bool) -> Iterator[Grid]:
    """The rank grid of this launch; torch.distributed is up inside and down afterwards. Collective."""
    logging.getLogger(LOGGER).setLevel(logging.DEBUG if verbose else logging.WARNING)
    torch.set_num_threads(threads_per_rank(ranks))
    address = f"{ranks.master_addr}:{ranks.master_port}"
    rendezvous = f"tcp://{address}" if ranks.world > 1 else None
    if ranks.launcher == "torchrun":  # its agent listens on the port and serves the store itself
        rendezvous = "env://"
    try:
        distributed.start(ranks.rank, ranks.world, ranks.local_rank, rendezvous)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        why = "is taken by another process" if "EADDRINUSE" in str(error) else f"cannot be reached ({str(error).splitlines()[0][:160]})"
        raise Mistake(f"the ranks cannot meet: {address} {why} → add `--master_port N` with a free port to the launch command") from error
    try:
        refuse_precision(precision)
        yield make_grid(pipe, tensor, sequence)
    finally:
        distributed.stop()


def software() -> list[str]:
    """Backends and the versions of torch and DeepSpeed, for the header of a run."""
    return [*distributed.backend_versions(), f"torch {torch.__version__.split('+')[0]}", f"deepspeed {version('deepspeed')}"]
