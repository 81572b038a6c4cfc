"""A token by itself, as text and as bytes: a token may be half a character."""

from typing import Any

from research.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SPACE = "▁"


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes it stands for; None where it cannot be said."""
    name = tokenizer.backend.id_to_token(token)
    if name is None:
        return None
    letters = _byte_letters()
    if _is_byte_level(tokenizer.backend) and all(letter in letters for letter in name):
        return [letters[letter] for letter in name]
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # sentencepiece's way
        return [int(name[3:5], 16)]
    text = tokenizer.decode([token])
    return None if UNFINISHED in text else list(text.encode())


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token as a client shows it: with the space that a tokenizer drops at the beginning of a text."""
    text, name = tokenizer.decode([token]), tokenizer.backend.id_to_token(token) or ""
    return f" {text}" if name.startswith(SPACE) and not text.startswith(" ") else text


def _is_byte_level(backend: Any) -> bool:
    return type(backend.decoder).__name__ == "ByteLevel"


def _byte_letters() -> dict[str, int]:
    """GPT-2's table: a visible letter for each byte. Visible ones stand for themselves, the others follow from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
