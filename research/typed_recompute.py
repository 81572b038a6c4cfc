"""Recomputation under the type checker: the second run of a block, inside the backward pass, is checked like the first.

Autograd runs it without the checker's modes, on inputs that it has saved and that have lost their types.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import spmd_types as spmd
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack  # as torch.utils.checkpoint itself asks for it

from models import recompute


@contextmanager
def typed_recompute() -> Iterator[None]:
    """Inside, what models/recompute.py runs again is typed again."""
    with mock.patch.object(recompute, "checkpoint", _twice_checked(recompute.checkpoint)):
        yield


def _twice_checked(checkpoint: Callable) -> Callable:
    def run(forward: Callable, *inputs: Any, **settings: Any) -> Any:
        modes = _get_current_function_mode_stack()
        types = [spmd.get_local_type(x) if isinstance(x, Tensor) else None for x in inputs]

        def either(*given: Any) -> Any:
            if _get_current_function_mode_stack():
                return forward(*given)
            for x, known in zip(given, types, strict=True):
                if isinstance(x, Tensor) and not spmd.has_local_type(x):
                    spmd.assert_type(x, known)
            with ExitStack() as again:
                for mode in modes:
                    again.enter_context(mode)
                return forward(*given)

        return checkpoint(either, *inputs, **settings)

    return run
