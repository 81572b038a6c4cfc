"""Errors that a client receives, in OpenAI's format: the message names the field that is wrong and says what to send instead."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """Ends a request with an HTTP status and a message. `param` names the field; None means the request as a whole."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Returns the JSON body as OpenAI's clients read it."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error_type = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, default)
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def invalid_field(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    """An error about one field. The message begins with the field's name."""
    return ApiError(400, f"{param} {message}", param, code)


def check_unicode(text: str, param: str) -> str:
    """Returns the text. Raises an ApiError if it contains a lone surrogate, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid_field(param, "holds half a character (a lone surrogate) → send whole ones") from None
    return text


def shutting_down() -> ApiError:
    """The error for requests that arrive, or are unfinished, while the server is being stopped."""
    return ApiError(503, "the server is shutting down → ask again when it is back", code="shutting_down", headers={"retry-after": "10"})
