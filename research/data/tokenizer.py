"""The built-in tokenizers, all made with the tokenizers library.

builtin:bpe-N    byte-level BPE of at most N tokens, trained on the training text; encodes every text
builtin:gpt2     GPT-2's own byte-level BPE; encodes every text
builtin:bytes    UTF-8 bytes: id = byte, 256 is end-of-text; encodes every text
builtin:chars    the characters of the training text, sorted, then end-of-text; another character in a text is a Mistake

Behind each of these names, +fim, +spans, +mask and +sep add special tokens (special_tokens.py).
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.errors import Mistake, nearest
from parallel.files import locked, published
from research.data import documents, special_tokens

if TYPE_CHECKING:
    import tokenizers

GPT2 = "builtin:gpt2"
GPT2_SIZE = 50257
BYTES, BYTES_SIZE = "builtin:bytes", 257
CHARS = "builtin:chars"
TRAINED = "builtin:bpe-"
END_OF_TEXT = "<|endoftext|>"
SMALLEST, LARGEST = 257, 1_000_000
"""Sizes of a byte-level BPE. With fewer tokens than 256 bytes and end-of-text, some text could not be encoded. The library reserves
memory for all of them before it trains; the largest vocabularies in use have a quarter of a million."""
RECIPE = 1
"""Part of every cached tokenizer's name. Raise it whenever training would give another table."""
TOKENS_PER_CHARACTER = 4
"""The most tokens that one character can have: a byte each."""
PIECE = 1 << 16
"""Characters per piece: small enough to spread a long document over threads and to bound memory."""
PANIC = "PanicException"
"""The class that pyo3 makes of a panic in Rust. No module exports it."""
NO_CHARACTER = "<no such character>"
"""What a WordLevel model calls an unknown token. The vocabulary does not have it, so that the library raises an error."""
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LETTERS = [chr(byte if byte in _SHOWN else 256 + sum(other not in _SHOWN for other in range(byte))) for byte in range(256)]
"""The letter that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
Waiting = Callable[[], AbstractContextManager[object]]
CUT = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back: `decode(encode(text)) == text` for every text that UTF-8 can hold.

    Text is never read as end-of-text: the letters of the marker in a document are encoded as ordinary tokens, so that a document
    ends only where `end_of_text` is put among the ids. `decode` shows it as the marker and skips ids >= vocab_size.
    """

    name: str
    vocab_size: int
    end_of_text: int
    fingerprint: str
    backend: "tokenizers.Tokenizer"
    cuts: bool = True
    """Whether a long text may be cut before it is tokenized (`pieces`). The pattern of the built-in tokenizers allows it."""
    begin: tuple[int, ...] = ()
    """The ids in front of every prompt (`<s>`, `<|begin_of_text|>`) if an imported model was trained so. The built-in ones have none."""
    behind: tuple[int, ...] = ()
    """The ids behind a whole text (`[SEP]`) by the template of a tokenizer.json. An encoder reads them; a text that goes on has none."""

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in parts whose ids, one after the other, are the ids of `text`."""
        return pieces(text) if self.cuts else iter([text])

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end-of-text."""
        return self.encode_batch([text])[0]

    def prompt(self, text: str) -> tuple[int, ...]:
        """The ids that a model continues: `begin` and the text's ids, or end-of-text (a new document begins) if both are empty."""
        return (*self.begin, *self.encode(text)) or (self.end_of_text,)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores. Other threads run meanwhile: of the library's methods, those for batches release the GIL.

        Raises a Mistake if the tokenizer cannot encode a text.
        """
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if is_library_error(error) and (lacking := [text for text in texts if known_letters(self.backend, text) != text]):
                letter = next(letter for letter in lacking[0] if not known_letters(self.backend, letter))
                raise no_such_character(letter, self.name) from None
            size = max(map(len, texts), default=0)
            raise library_error(error, f"the tokenizer {self.name} cannot encode a text of {size} characters") from None

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_batch` as arrays of int32."""
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Bytes that are not a whole character become U+FFFD. Raises a Mistake if the tokenizer cannot decode them."""
        numbers = [int(i) for i in ids]
        try:
            return self.backend.decode(numbers, skip_special_tokens=False)
        except BaseException as error:
            raise library_error(error, f"the tokenizer {self.name} cannot decode {len(numbers)} ids") from None


@dataclass(frozen=True)
class UnitTokenizer(Tokenizer):
    """`builtin:bytes` or `builtin:chars`: the ids of its `backend` by one look into a table, about a hundred times as fast."""

    alphabet: tuple[str, ...] = ()
    """The characters whose places are their ids; none: bytes."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As Tokenizer's."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As Tokenizer's. A Mistake names the first character that has no id."""
        try:
            encoded = [text.encode("utf-32-le" if self.alphabet else "utf-8") for text in texts]
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise library_error(error, f"the tokenizer {self.name} cannot encode a text") from None
        if not self.alphabet:
            return [np.frombuffer(raw, np.uint8).astype(np.int32) for raw in encoded]
        known = np.array([ord(letter) for letter in self.alphabet], np.uint32)
        found = []
        for raw in encoded:
            points = np.frombuffer(raw, "<u4")
            ids = np.searchsorted(known, points).astype(np.int32)
            unknown = known[np.minimum(ids, len(known) - 1)] != points
            if unknown.any():
                raise no_such_character(chr(points[int(np.argmax(unknown))]), self.name)
            found.append(ids)
        return found


def known_letters(backend: "tokenizers.Tokenizer", text: str) -> str:
    """The characters of `text` that a tokenizer of characters knows; of any other tokenizer, all of them."""
    if type(backend.model).__name__ != "WordLevel":
        return text
    vocabulary = backend.get_vocab()
    return "".join(letter for letter in text if letter in vocabulary)


def no_such_character(letter: str, name: str) -> Mistake:
    """The Mistake for a text with a character that a tokenizer of characters was not made from."""
    which = f"{letter!r} (U+{ord(letter):04X})"
    return Mistake(
        f"the tokenizer {name} has no character {which} → leave it out, or use {BYTES} or {TRAINED}8192, which encode every text"
    )


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library may have raised this error.

    It raises bare Exceptions. Where a regular expression of a tokenizer reaches the limit of its engine, it raises a
    PanicException, which is no Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == PANIC


def library_error(error: BaseException, problem: str, way_out: str = "shorten it, or use another tokenizer") -> BaseException:
    """What to raise for an error of the tokenizers library: a Mistake that begins with `problem`. Any other error is returned as it is."""
    if isinstance(error, Mistake | MemoryError) or not is_library_error(error):
        return error
    return Mistake(f"{problem} ({' '.join(str(error).split())[:120]}) → {way_out}")


def declared_vocab_size(name: str) -> int:
    """The size in a tokenizer's name (training on little text may give fewer tokens, and builtin:chars has more). Imports nothing heavy.

    A name that is not known is a Mistake.
    """
    base, added = special_tokens.parted(name) if name.startswith(documents.BUILTIN) else (name, ())
    return _declared_size(base, name) + len(added)


def _declared_size(base: str, name: str) -> int:
    """`declared_vocab_size` without the special tokens that are added to `base`."""
    if base in (GPT2, BYTES):
        return GPT2_SIZE if base == GPT2 else BYTES_SIZE
    if base == CHARS:
        return 2  # at least: the text tells
    size = base.removeprefix(TRAINED)
    if not base.startswith(TRAINED) or not (size.isascii() and size.isdecimal()):
        near = nearest(base, [f"{TRAINED}8192", GPT2, BYTES, CHARS])
        guess = f" ({near} is meant?)" if near else ""
        others = f"{GPT2}, {BYTES}, {CHARS} or a tokenizer.json"
        raise Mistake(f"data.tokenizer = {name!r} is not known{guess} → use {TRAINED}8192 (any size), {others}")
    if len(size) > len(str(LARGEST)) or int(size) > LARGEST:
        raise Mistake(f"data.tokenizer = {name!r} is larger than {LARGEST} → use {TRAINED}8192, or another size up to {LARGEST}")
    if int(size) < SMALLEST:
        raise Mistake(f"data.tokenizer = {name!r} is smaller than {SMALLEST}, 256 bytes and end-of-text → use {TRAINED}8192")
    return int(size)


def is_made_from_text(name: str) -> bool:
    """Whether the tokenizer depends on the training text."""
    return name.startswith((TRAINED, CHARS))


def fixed(name: str) -> Tokenizer:
    """GPT2 or BYTES, with the special tokens that the name adds."""
    return gpt2(name) if special_tokens.parted(name)[0] == GPT2 else from_json(name, unit_tokenizer())


def trained(name: str, texts: Iterable[str], source: str, cache: Path, waiting: Waiting = contextlib.nullcontext) -> Tokenizer:
    """The `builtin:bpe-N` or `builtin:chars` made from `texts`, cached in the folder `cache` under `source`, the digest of the texts.

    Any number of processes may call this at once: one reads the texts and trains, the others wait for its file, inside of `waiting`.
    """
    path = _cached_file(name, source, cache)
    tokenizer = _read(name, path)
    if tokenizer is None:
        with locked(path.with_suffix(".lock"), waiting):
            tokenizer = _read(name, path)
            if tokenizer is None:
                text = made_from(special_tokens.parted(name)[0], texts)
                with published(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
                tokenizer = _read(name, path)
    assert tokenizer is not None, path
    return tokenizer


def made_from(name: str, texts: Iterable[str]) -> str:
    """The `builtin:bpe-N` or `builtin:chars` made from `texts`, with the special tokens that the name adds, as JSON."""
    base, added = special_tokens.parted(name)
    if base == CHARS:
        letters: set[str] = set()
        for text in texts:
            letters.update(text)
        made = unit_tokenizer(sorted(letters))
    else:
        made = train_bpe(texts, declared_vocab_size(base))
    return from_json(name, made).backend.to_str() if added else made


def kept(name: str, source: str, cache: Path) -> Tokenizer | None:
    """The tokenizer that `trained` has cached; None if it would have to train."""
    return _read(name, _cached_file(name, source, cache))


def _cached_file(name: str, source: str, cache: Path) -> Path:
    """The file of the tokenizer without the special tokens that its name adds, which all such names share."""
    base, _ = special_tokens.parted(name)
    kind = "chars" if base == CHARS else f"bpe-{declared_vocab_size(base)}"
    return cache / f"{kind}-{source[:16]}-v{RECIPE}.json"


def gpt2(name: str = GPT2) -> Tokenizer:
    """GPT-2's 50,257 tokens, from the tables in builtin/gpt2, and the special tokens that the name adds."""
    from tokenizers import models

    vocabulary, merges = documents.FOLDER / "gpt2" / "vocab.json", documents.FOLDER / "gpt2" / "merges.txt"
    backend = _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    return _wrap(name, backend, hashlib.sha256(vocabulary.read_bytes() + merges.read_bytes()).hexdigest())


def unit_tokenizer(alphabet: Sequence[str] = ()) -> str:
    """A tokenizer of single characters, or without an alphabet of bytes, as JSON: the ids are the places, the last is end-of-text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if not alphabet:
        letters = BYTE_LETTERS
        return _byte_level(models.BPE({letter: i for i, letter in enumerate([*letters, END_OF_TEXT])}, [])).to_str()
    backend = Backend(models.WordLevel({letter: i for i, letter in enumerate([*alphabet, END_OF_TEXT])}, unk_token=NO_CHARACTER))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend.to_str()


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE trained on `texts`, as JSON: id 0 is end-of-text, 1…256 the bytes, then the merges.

    Equal texts give equal JSON, whatever the number of threads. It holds fewer than `vocab_size` tokens if nothing is
    left to merge.
    """
    from tokenizers import models, pre_tokenizers, trainers

    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return backend.to_str()


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in parts of `size` characters or a little more, whose ids, one after the other, are the ids of `text`.

    A cut before a space or a newline that follows another character cannot change what GPT-2's pattern matches, because every
    match ends there anyway. Text without such a place stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _byte_level(model: "tokenizers.models.BPE") -> "tokenizers.Tokenizer":
    """The library's tokenizer over a BPE model, with GPT-2's pattern and bytes as letters."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(name: str, backend: "tokenizers.Tokenizer", fingerprint: str) -> Tokenizer:
    base, added = special_tokens.parted(name)
    backend.add_special_tokens([END_OF_TEXT, *added])  # the tables hold the first already: this marks its id as special
    backend.encode_special_tokens = True  # their letters in a text are encoded as letters
    end_of_text = backend.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, name
    if added:  # the file that `trained` keeps does not hold them
        fingerprint = hashlib.sha256("\0".join([fingerprint, *added]).encode()).hexdigest()
    if base in (BYTES, CHARS):
        alphabet = sorted(backend.get_vocab().keys() - {END_OF_TEXT, *added}) if base == CHARS else ()
        return UnitTokenizer(name, backend.get_vocab_size(), end_of_text, fingerprint, backend, alphabet=tuple(alphabet))
    return Tokenizer(name, backend.get_vocab_size(), end_of_text, fingerprint, backend)


def _read(name: str, path: Path) -> Tokenizer | None:
    """The cached tokenizer; None if there is none or its file is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return from_json(name, text)
    except Exception:  # the library raises bare Exception; whatever it is, the file is of no use and is made again
        return None


def from_json(name: str, text: str) -> Tokenizer:
    """The built-in tokenizer `name` from its JSON."""
    from tokenizers import Tokenizer as Backend

    return _wrap(name, Backend.from_str(text), hashlib.sha256(text.encode()).hexdigest())
