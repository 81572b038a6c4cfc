"""Authentication: the token, compared in constant time; the Host header without a token; and command lines that are rejected."""

import hmac
import itertools

import pytest

pytest.importorskip("fastapi")

from parallel.errors import Mistake
from research.serving import access
from research.serving.access import Access, is_loopback, read_token
from research.serving.errors import ApiError
from tests.research.serving.helpers.servers import served

TOKEN = "0123456789abcdefTOKEN"


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "127.0.0.1.example.org", "")))


@pytest.mark.parametrize(("given", "passes"), [
    (f"Bearer {TOKEN}", True), (f"bearer  {TOKEN}", True), (TOKEN, False), ("Bearer ", False),
    (f"Bearer {TOKEN}x", False), (f"Bearer {TOKEN[:-1]}", False), (f"Basic {TOKEN}", False), ("Bearer ½é", False), ("", False),
])  # fmt: skip
def test_the_token(given, passes):
    if passes:
        Access(TOKEN).check({"authorization": given})
        return
    with pytest.raises(ApiError) as refused:
        Access(TOKEN).check({"authorization": given})
    assert refused.value.status == 401 and TOKEN not in refused.value.message and refused.value.headers["www-authenticate"] == "Bearer"


def test_it_is_compared_in_constant_time(monkeypatch):
    seen, compare = [], hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    Access(TOKEN).check({"authorization": f"Bearer {TOKEN}"})
    assert seen == [(TOKEN.encode(), TOKEN.encode())]


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "127.0.0.1:1"])
def test_a_host_of_this_machine(host):
    Access(None).check({"host": host})


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "[::2]:8000", "127.0.0.1.evil.example", "169.254.1.1"])
def test_a_name_that_was_pointed_here_is_refused(host):
    with pytest.raises(ApiError, match="not this machine") as refused:
        Access(None).check({"host": host})
    assert refused.value.status == 403


def test_a_token_file(tmp_path):
    path = tmp_path / "token"
    for content in (f"{TOKEN}\n", f"\ufeff{TOKEN}\r\n", "a" * 512 + "\r\n"):
        path.write_bytes(content.encode())
        assert read_token(path) == content.strip("\ufeff\r\n")
    for wrong in (b"", b"short", b"two words of some length", b"\xff" * 30, b"x" * 600, "½".encode() * 20):
        path.write_bytes(wrong)
        with pytest.raises(Mistake, match="secrets.token_urlsafe"):
            read_token(path)
    with pytest.raises(Mistake, match="cannot be read"):
        read_token(tmp_path / "none")


def test_a_server_with_a_token(small, tmp_path):
    """Nothing of the model without it; the page, which asks for it, and /health are open."""
    (tmp_path / "token").write_text(TOKEN)
    with served(small, "--token_file", str(tmp_path / "token")) as locked, locked.client() as client:
        closed = [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/x")]
        for (method, path), headers in itertools.product(closed, ({}, {"authorization": "Bearer wrong"})):
            answer = client.request(method, path, headers=headers, content=b"x" * 100_000 if method == "POST" else None)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert [client.get(path).status_code for path in ("/", "/page.js", "/page.css", "/health")] == [200] * 4
        with_it = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=with_it | {"host": "behind.a.proxy"}).status_code == 200
        assert client.post("/v1/completions", headers=with_it, json={"prompt": "war", "max_tokens": 1}).status_code == 200
