"""tiktoken's ranks (.tiktoken: a token in base64 and its rank on each line) as a tokenizer.json of the tokenizers library.

The file does not hold the pattern that splits a text into words: it is known by the number of ranks, and else taken to be cl100k's, which
is also Llama 3's. End-of-text gets the id after the last rank.
"""

import base64
import binascii
from pathlib import Path

from parallel.errors import Mistake
from parallel.regular_files import read_regular
from research.data.tokenizer import BYTE_LETTERS, END_OF_TEXT

SUFFIX = ".tiktoken"
LARGEST, LONGEST = 64 * 2**20, 1 << 10
"""The most bytes of a file, and of a token: all ways to cut a token in two are tried."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER, _ENDING = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    f"{_WORD}{_UPPER}*{_LOWER}+{_ENDING}|{_WORD}{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {50256: ("gpt2", GPT2), 100256: ("cl100k", CL100K), 199998: ("o200k", O200K)}
"""Number of ranks -> the name of the pattern, and a pattern that matches what tiktoken's does."""


def pattern_of(ranks: dict[bytes, int]) -> tuple[str, str]:
    """(name, pattern) for a file of so many ranks."""
    return PATTERNS.get(len(ranks), ("cl100k", CL100K))


def read(path: Path) -> dict[bytes, int]:
    """Token -> rank. A Mistake names the line that is none, or what is missing."""
    try:
        raw = read_regular(path, LARGEST)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror or error}) → check the file and its permissions") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            text = base64.b64decode(token, validate=True)
            if len(text) > LONGEST:
                problem = f"{path}, line {number} has a token of {len(text)} bytes, the most is {LONGEST}"
                raise Mistake(f"{problem} → name a {SUFFIX} file of tiktoken")
            ranks[text] = int(rank)
        except Mistake:
            raise
        except (ValueError, binascii.Error):
            raise Mistake(f"{path}, line {number} is no token in base64 and its rank → name a {SUFFIX} file of tiktoken") from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise Mistake(f"{path} has {len(ranks)} tokens, and none for the byte {missing[0]} → name a whole {SUFFIX} file of tiktoken")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise Mistake(f"{path}: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}, each once → name a whole {SUFFIX} file of tiktoken")
    return ranks


def tokenizer_json(ranks: dict[bytes, int]) -> str:
    """The tokenizer of the tokenizers library that gives tiktoken's ids.

    tiktoken merges the two neighbours whose concatenation has the lowest rank, whatever the two are. So each way to cut a token into two
    tokens is a merge, with the rank of the whole.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spelled = {token: "".join(BYTE_LETTERS[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spelled[a], spelled[b]) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    backend = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern_of(ranks)[1]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend.to_str()
