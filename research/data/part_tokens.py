"""The tokens of parts of a text whose own tokens are known. With GPT-2's pattern, only words that a cut divides are tokenized again."""

import contextlib

import numpy as np

from research.data.tokenizer import BYTE_LETTERS, CUT, Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
Part = list[np.ndarray | str]
"""Pieces of a part, in order: tokens that are known, and texts that are to be encoded."""


class PartTokens:
    """Cuts texts of one tokenizer into parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = np.array(sorted({tokenizer.end_of_text, *(number for number, token in added.items() if token.special)}), np.int64)
        self._bytes = _bytes_of_tokens(tokenizer, set(self._special.tolist()))
        self._lengths = np.array([len(raw) for raw in self._bytes], np.int64)

    def text(self, ids: np.ndarray) -> str:
        """The text of tokens; '' if they are not those of a whole text: a special token, or a part of a character."""
        if self._bytes:
            try:
                return b"".join(map(self._bytes.__getitem__, ids.tolist())).decode()
            except UnicodeDecodeError:
                return ""
        if np.isin(ids, self._special).any():
            return ""
        text = self.tokenizer.decode(ids)
        is_whole = UNKNOWN not in text or self.tokenizer.encode(text) == ids.tolist()
        return text if is_whole else ""

    def parts(self, ids: np.ndarray, text: str, begin: int, end: int) -> list[Part]:
        """text[:begin], text[begin:end] and text[end:], where `text` is that of `ids`.

        Encoding a part as a whole gives the same tokens, if the text is a document. If it is a piece of one, its first and last word
        keep the tokens that they have in the document.
        """
        borders = [(0, begin), (begin, end), (end, len(text))]
        if not self._bytes:
            return [[text[first:last]] for first, last in borders]
        begins, is_ascii = np.append(0, np.cumsum(self._lengths[ids])), text.isascii()

        def part(first: int, last: int) -> Part:
            """Between the first and the last place where the pattern cuts any text, the tokens are known."""
            match = CUT.search(text, first + 1, last) if first else None
            begun = match.start() if match else last * bool(first)
            ended = last if last == len(text) else _last_cut(text, first, last)
            if begun >= ended:
                return [text[first:last]]
            offsets = [begun, ended] if is_ascii else [len(text[:place].encode()) for place in (begun, ended)]
            places = np.searchsorted(begins, offsets)
            if begins[places].tolist() != offsets:  # not the tokens that encoding the text gives
                return [text[first:last]]
            return [text[first:begun], ids[places[0] : places[1]], text[ended:last]]

        return [part(first, last) for first, last in borders]

    def encoded(self, parts: list[Part]) -> list[np.ndarray]:
        """The tokens of each part."""
        texts = self.tokenizer.encode_arrays([piece for part in parts for piece in part if isinstance(piece, str)])
        left = iter(texts)
        return [np.concatenate([next(left) if isinstance(piece, str) else piece for piece in part]) for part in parts]


def _last_cut(text: str, first: int, last: int) -> int:
    """The last place of CUT in (first, last]; `first` if there is none."""
    place = last + 1
    while place > first:
        place = max(text.rfind(" ", first + 1, place), text.rfind("\n", first + 1, place))
        if place < 0 or not text[place - 1].isspace():
            break
    return max(place, first)


def _bytes_of_tokens(tokenizer: Tokenizer, special: set[int]) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer with GPT-2's pattern and no normaliser; empty for another one.

    A special token has a byte that UTF-8 has nowhere.
    """
    backend = tokenizer.backend
    pattern = backend.pre_tokenizer
    if type(pattern).__name__ != "ByteLevel" or not pattern.use_regex or pattern.add_prefix_space or backend.normalizer is not None:
        return []
    table = str.maketrans({letter: chr(byte) for byte, letter in enumerate(BYTE_LETTERS)})
    found = [b"\xff"] * tokenizer.vocab_size
    for name, number in backend.get_vocab().items():
        if number not in special:
            with contextlib.suppress(UnicodeEncodeError):  # a token of letters that stand for no byte
                found[number] = name.translate(table).encode("latin-1")
    return found
