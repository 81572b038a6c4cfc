"""A call that may hang, held to a time."""

import threading
from collections.abc import Callable
from typing import Any


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """The call's result if it comes within `seconds`; None if it does not, or if the call raises. A call that is late goes on unheard."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception:  # the caller is told by None
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    return result[0] if result else None
