"""Keeps DeepSpeed from talking while it builds, unless it has something to warn of."""

import contextlib
import io
import logging
from collections.abc import Iterator

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
