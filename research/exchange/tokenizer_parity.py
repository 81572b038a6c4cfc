"""Compares token ids: the certificate's text through transformers' tokenizer of a folder, and through ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.data import documents
from research.data.tokenizer import Tokenizer, is_library_error, known_letters, library_error
from research.exchange.parity import TEXT, quiet_transformers, without_panic_messages

CHARACTERS = 10_000
"""Length of the text. Its beginning is compared again behind a space, and behind line breaks."""


@dataclass(frozen=True)
class IdsComparison:
    """The result of a comparison."""

    tokens: int
    """How many tokens were compared."""
    difference: str | None
    """The first place where the ids differ, in words; None if there is none."""
    tail: tuple[int, ...]
    """What transformers puts behind a text, and we do not: its end is where training puts the end-of-text token."""

    def line(self) -> str:
        """The comparison as one line for the terminal."""
        return f"equal to those of transformers' tokenizer, {self.tokens:,} tokens of the certificate's text"

    def table(self) -> dict[str, Any]:
        """What certificate.json says about it."""
        return {"tokens": self.tokens, "equal": self.difference is None}


def their_tokenizer(folder: Path, shown: Path) -> Any:
    """transformers' tokenizer of a folder, whose programs are not run. `shown` is the path that an error names."""
    import transformers

    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except BaseException as error:
            if not is_library_error(error):
                raise
            said = " ".join(str(error).split()).replace(str(folder), str(shown))[:160]
            raise Mistake(f"transformers cannot read the tokenizer of {shown} ({type(error).__name__}: {said}) → fetch it again") from None


def compare(ours: Tokenizer, theirs: Any) -> IdsComparison:
    """Compares the ids of prompts, with the tokens that the tokenizer puts in front of a text, on the certificate's text."""
    tokens, tail = 0, tuple[int, ...]()
    texts = [known for text in _texts() if (known := known_letters(ours.backend, text))]
    if not texts:  # a tokenizer of characters that the certificate's text does not have
        texts = [ours.decode(i for i in range(ours.vocab_size) if i != ours.end_of_text)]
    for text in texts:
        try:
            with quiet_transformers(), without_panic_messages():
                expected = theirs(text, verbose=False).input_ids
        except BaseException as error:
            problem = f"transformers' tokenizer cannot encode {len(text)} characters of the certificate's text"
            raise library_error(error, problem, "name another tokenizer: --tokenizer PATH") from None
        found = list(ours.prompt(text))
        tokens += len(found)
        if difference := _difference(found, expected[: len(found)], ours):
            return IdsComparison(tokens, difference, ())
        tail = tuple(expected[len(found) :])
    return IdsComparison(tokens, None, tail)


def _texts() -> tuple[str, ...]:
    text = next(documents.documents(TEXT, Path()))[:CHARACTERS]
    return text, f" {text[:1000]}", f"\n\n{text[:1000]}  \t1787: don't"


def _difference(ours: list[int], theirs: list[int], tokenizer: Tokenizer) -> str | None:
    if ours == theirs:
        return None
    first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
    here, there = (tokenizer.decode(ids[first : first + 2]) for ids in (ours, theirs))
    return f"token {first} of the text is {theirs[first : first + 2]} ({there!r}) there and {ours[first : first + 2]} ({here!r}) here"
