"""What a client is told when its request cannot be served: OpenAI's error shape, with the field's name and the way out."""

from collections.abc import Mapping
from typing import Any

REQUEST, SERVER = "invalid_request_error", "server_error"
RETRY_AFTER = 1
"""Seconds after which a client that was turned away may ask again."""


class ApiError(Exception):
    """A request's end. `param` names the field, None: the request as a whole."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    @property
    def type(self) -> str:
        """Whose fault it is."""
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, SERVER if self.status >= 500 else REQUEST)

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    """A field that does not work; the message begins with its name."""
    return ApiError(400, f"{param} {message}", param, code)


def whole_text(text: str, place: str) -> str:
    """The text; a Refusal where JSON has smuggled in a half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise wrong(place, "holds half a character (a lone surrogate) → send whole ones") from None
    return text


def busy(room: int) -> ApiError:
    """All slots are taken, and all places of the queue."""
    return ApiError(
        429,
        f"{room} texts are being written or wait already → ask again in {RETRY_AFTER} s",
        code="queue_full",
        headers={"retry-after": str(RETRY_AFTER)},
    )


def closing() -> ApiError:
    """The server is being stopped."""
    return ApiError(503, "the server is shutting down → ask again when it is back", code="shutting_down", headers={"retry-after": "10"})
