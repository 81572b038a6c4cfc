"""Authentication: with a token file, a client sends the token; without one, only clients on this machine are served."""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import Mistake
from parallel.regular_files import BYTE_ORDER_MARK
from research.serving.errors import ApiError

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 512
LOCAL_NAMES = ("localhost",)
MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > TOKEN; chmod 600 TOKEN"


@dataclass(frozen=True)
class Access:
    """Checks the headers of a request. If `token` is None, the server listens on this machine only."""

    token: str | None

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises an ApiError if the client has no access. The token is compared in constant time.

        Without a token, the Host header must name this machine. Otherwise a web page of any site whose domain name resolves to
        this machine (DNS rebinding) could read the answers in a visitor's browser.
        """
        if self.token is None:
            host = headers.get("host", "")
            name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):
                message = f"the Host header names {name[:100]!r}, not this machine"
                raise ApiError(403, f"{message} → ask http://127.0.0.1, or start the server with --token_file", code="wrong_host")
            return

        scheme, _, sent_token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent_token.strip().encode(), self.token.encode()):
            problem = "is not the server's" if sent_token else "is missing"
            raise ApiError(
                401,
                f"the token {problem} → send the header Authorization: Bearer TOKEN (api_key in OpenAI's clients)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in LOCAL_NAMES


def read_token(path: Path) -> str:
    """Reads the token from a file that holds one line of visible ASCII characters."""
    try:
        with path.open("rb") as file:
            token = file.read(LONGEST_TOKEN + 5).removeprefix(BYTE_ORDER_MARK).decode("ascii").strip()  # 5: the mark and a line end
    except UnicodeDecodeError:
        raise Mistake(f"--token_file {path} is not ASCII → make one: {MAKE_TOKEN}") from None
    except OSError as error:
        raise Mistake(f"--token_file {path} cannot be read ({error.strerror}) → make one: {MAKE_TOKEN}") from None
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        length = f"{SHORTEST_TOKEN} to {LONGEST_TOKEN}"
        raise Mistake(f"--token_file {path} does not hold one word of {length} letters and digits → make one: {MAKE_TOKEN}")
    return token
