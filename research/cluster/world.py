"""Brings up torch.distributed on this rank of a launch, with its threads and log level. The first step after torch is imported."""

import contextlib
import logging
import re
import socket
from collections.abc import Iterator
from importlib.metadata import version

import torch

from parallel import distributed
from parallel.distributed import LOGGER
from parallel.engines.engine import refuse_precision
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from research.cluster.environment import GLOO_INTERFACE, Ranks, threads_per_rank
from research.cluster.rendezvous import Rendezvous

OF_THE_NETWORK = re.compile(r"\bgloo\b|nccl|socket|connect|timed? ?out", re.I)
"""Matches torch's errors about ranks that do not reach one another."""


@contextlib.contextmanager
def joined(
    ranks: Ranks, pipe: int, tensor: int, sequence: bool, precision: str, verbose: bool, rendezvous: Rendezvous | None = None
) -> Iterator[Grid]:
    """The rank grid of this launch; torch.distributed is up inside and down afterwards. Collective.

    `rendezvous`: where the ranks have met; None for a world of one.
    """
    logging.getLogger(LOGGER).setLevel(logging.DEBUG if verbose else logging.WARNING)
    torch.set_num_threads(threads_per_rank(ranks))
    with rendezvous.sharing_errors() if rendezvous else contextlib.nullcontext():
        refuse_precision(precision)
        if rendezvous:
            rendezvous.decide("ready to connect", None, lambda values: None)  # from here on a rank that fails is missed by a collective
    try:
        distributed.start(ranks.rank, ranks.world, ranks.local_rank, rendezvous.whole_store if rendezvous else None)
    except RuntimeError as error:
        if not OF_THE_NETWORK.search(str(error)):
            raise
        raise Mistake(
            f"rank {ranks.rank} on {socket.gethostname()} cannot connect to the other ranks ({str(error).splitlines()[0][:160]}) → "
            f"see whether a firewall closes ports between the hosts, and whether {GLOO_INTERFACE} names the right interface; "
            "--check-cluster shows each host's address"
        ) from error
    try:
        yield make_grid(pipe, tensor, sequence)
    finally:
        distributed.stop()


def software() -> list[str]:
    """Backends and the versions of torch and DeepSpeed, for the header of a run."""
    return [*distributed.backend_versions(), f"torch {torch.__version__.split('+')[0]}", f"deepspeed {version('deepspeed')}"]
