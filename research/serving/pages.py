"""The chat page: three files of ours, and a policy that lets a browser load nothing else."""

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

FOLDER = Path(__file__).resolve().parent / "page"
FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "connect")),
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


def add(app: FastAPI) -> None:
    """Adds a route for each of the files, which are read now."""
    for address, (name, kind) in FILES.items():
        content = (FOLDER / name).read_bytes()
        headers = {"content-type": f"{kind}; charset=utf-8", "content-security-policy": POLICY, "cache-control": "no-cache"}
        app.add_api_route(address, _sender(content, headers), methods=["GET"], include_in_schema=False)


def _sender(content: bytes, headers: dict[str, str]):
    async def send() -> Response:
        return Response(content, headers=headers)

    return send
