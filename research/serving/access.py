"""Who may ask: whoever has the token; without one, only this machine, under its own name."""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import Mistake
from research.serving.errors import ApiError

SHORTEST, LONGEST = 16, 512
LOCAL_NAMES = ("localhost",)
MAKE = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > TOKEN; chmod 600 TOKEN"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in LOCAL_NAMES


def read_token(path: Path) -> str:
    """The token in a file: one line of visible ASCII."""
    try:
        with path.open("rb") as file:
            token = file.read(LONGEST + 2).decode("ascii").strip()
    except UnicodeDecodeError:
        raise Mistake(f"--token_file {path} is not ASCII → make one: {MAKE}") from None
    except OSError as error:
        raise Mistake(f"--token_file {path} cannot be read ({error.strerror}) → make one: {MAKE}") from None
    if not SHORTEST <= len(token) <= LONGEST or not all("!" <= letter <= "~" for letter in token):
        raise Mistake(f"--token_file {path} does not hold one word of {SHORTEST} to {LONGEST} letters and digits → make one: {MAKE}")
    return token


@dataclass(frozen=True)
class Access:
    """The rule. `token` None: the server listens on this machine only."""

    token: str | None

    def check(self, headers: Mapping[str, str]) -> None:
        """A Refusal for who may not ask. The token is compared in constant time.

        Without a token the Host header must name this machine: else a page of any site, whose name's owner lets it point here,
        could read the answers in a visitor's browser.
        """
        if self.token is None:
            self._check_host(headers.get("host", ""))
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            said = "is not the server's" if given else "is missing"
            raise ApiError(
                401,
                f"the token {said} → send the header Authorization: Bearer TOKEN (api_key in OpenAI's clients)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_host(self, host: str) -> None:
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if not is_loopback(name):
            said = f"the Host header names {name[:100]!r}, not this machine"
            raise ApiError(403, f"{said} → ask http://127.0.0.1, or start the server with --token_file", code="wrong_host")
