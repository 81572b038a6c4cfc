"""A request's body, counted and timed while it comes, as a table of strict JSON."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from research.serving.limits import Limits
from research.serving.refusal import Refusal

JSON = "application/json"
BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
"""Strings are matched so that brackets in them are not counted; one that does not end matches nothing, and the parser refuses it."""
DIGITS = 20
"""Of a whole number: 64 bits have 19 at most, and a sign."""
FIELDS = 512
"""Of one object."""


async def read(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limits: Limits) -> dict[str, Any]:
    """The table. Refused by type (415), size (413, whatever Content-Length says), time (408), and where it is not JSON (400)."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # a page of another site cannot send this type without asking first, and it is not answered
        raise Refusal(415, f"the body's content-type is {kind[:60]!r} → send {JSON}", code="unsupported_media_type")
    try:
        async with asyncio.timeout(limits.body_seconds):
            raw = await _collected(chunks, limits.body_bytes)
    except TimeoutError:
        raise Refusal(408, f"the body took more than {limits.body_seconds:g} s → send it at once", code="timeout") from None
    return await asyncio.to_thread(parse, raw, limits.depth)


async def _collected(chunks: AsyncIterator[bytes], most: int) -> bytes:
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) > most:
            raise Refusal(413, f"the body has more than {most} bytes → send less, or start the server with --body_bytes", code="too_large")
    return bytes(found)


def parse(raw: bytes, depth: int) -> dict[str, Any]:
    """A JSON object in UTF-8: no key twice, no NaN, no number that a computer cannot hold, not too deep."""
    if _depth(raw, depth) > depth:
        raise _not_json(f"is more than {depth} brackets deep", "too_deep")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_table, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except UnicodeDecodeError as error:
        raise _not_json(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _not_json(f"is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise _not_json("is JSON, but no object")
    return value


def _not_json(what: str, code: str = "invalid_json") -> Refusal:
    return Refusal(400, f'the body {what} → send a JSON object such as {{"prompt": "…"}}', code=code)


def _depth(raw: bytes, enough: int) -> int:
    """How deep brackets are inside of each other; stops counting once it is more than `enough`."""
    depth = most = 0
    for match in BRACKETS.finditer(raw):
        first = match[0][:1]
        depth += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if (most := max(most, depth)) > enough:
            break
    return most


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) > FIELDS:
        raise _not_json(f"has an object with more than {FIELDS} fields")
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Refusal(400, f"{twice[:100]} is there twice → send it once", twice[:100], "invalid_json")
    return found


def _constant(name: str) -> float:
    raise _not_json(f"contains {name}, which is no number of JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _not_json(f"contains {text[:40]}, which is too large")
    return number


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise _not_json(f"contains {text[:DIGITS]}…, a number of {len(text)} digits")
    return int(text)
