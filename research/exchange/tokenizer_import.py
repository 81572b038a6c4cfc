"""Makes the tokenizer files of an import from a stranger's, in a child process with little memory and time.

A tokenizer.json is a program of a kind: its normaliser may make gigabytes of one letter, its regular expressions may never end, and the
library that runs it may abort the process. So everything that is done with one for the first time is done in the child: it is converted,
compared with transformers' own, and given the text of the certificate. What has worked there works again in the parent.
"""

from pathlib import Path
from typing import Any

from models.encoder_config import T5, AnyModel
from parallel.errors import Mistake
from parallel.regular_files import check_inside
from research.cluster.limited_process import run_limited
from research.data import tokenizer_file
from research.data.tokenizer import Tokenizer
from research.exchange import hf_tokenizer, parity, tokenizer_parity
from research.exchange.gguf import GGUFFile, convert_tokenizer
from research.exchange.hf_reader import CONFIG
from research.exchange.limited_tokenizer import limits
from research.exchange.source import Source, private_view
from research.exchange.tokenizer_parity import IdsComparison

WAY_OUT = "do not use it, or name another one: --tokenizer builtin:gpt2, --tokenizer PATH"


def _import_what_the_child_needs() -> None:
    """Imports transformers' parts, which it would import at their first use: two seconds that are no tokenizer's."""
    import transformers.integrations.gguf
    import transformers.modeling_utils

    assert transformers.AutoConfig and transformers.AutoTokenizer and transformers.PreTrainedTokenizerFast


class TokenizerImport:
    """The tokenizer of one import: that of `source`, or the file `named` in its place. `target` is the folder that it is written to."""

    def __init__(self, source: Source, named: Path | None, target: Path, model: AnyModel) -> None:
        self.source, self.named, self.target, self.model = source, named, target, model
        self.left_out: list[str] = []
        """A sentence for each thing that is not taken."""
        self.ids: IdsComparison | None = None
        """The comparison of token ids with transformers' tokenizer; None if the tokenizer is not the folder's own."""
        self.origin = named.parent if named else source.path
        """What an error names instead of `target`."""

    def run(self) -> Tokenizer:
        """Writes the files, in the child, and returns the tokenizer that they make."""
        _import_what_the_child_needs()
        answer = run_limited(self._in_child, f"the tokenizer of {self.origin}", WAY_OUT, *limits(self._bytes_read()))
        self.left_out, ids = answer["left_out"], answer["ids"]
        self.ids = None if ids is None else IdsComparison(ids[0], ids[1], tuple(ids[2]))
        return self._loaded()

    def _bytes_read(self) -> int:
        """The size of what the tokenizer is made from."""
        if self.named is None and isinstance(self.source, GGUFFile):
            return self.source.header_size
        file = self.named or self.source.path / tokenizer_file.FILE
        return file.stat().st_size if file.is_file() else 0

    def _in_child(self) -> dict[str, Any]:
        """Writes the files, and uses them as the parent will."""
        self._write()
        tokenizer = self._loaded()
        if self.named is None and not isinstance(self.source, GGUFFile):
            tokenizer = self._matched(tokenizer)
        if tokenizer.vocab_size > self.model.vocab_size or max(tokenizer.begin, default=0) >= self.model.vocab_size:
            last = tokenizer.backend.id_to_token(tokenizer.vocab_size - 1)
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {self.model.vocab_size} (the last token is {last!r:.40})"
            raise Mistake(f"{sizes} → name the one it was trained with: --tokenizer PATH")
        parity.sample_texts(tokenizer)
        return {"left_out": self.left_out, "ids": self.ids and [self.ids.tokens, self.ids.difference, list(self.ids.tail)]}

    def _write(self) -> None:
        if self.named is None and isinstance(self.source, GGUFFile):
            backend, config = convert_tokenizer(self.source)
            hf_tokenizer.save_tokenizer(self.target, backend, config, config["chat_template"], self.model.seq_length)
            return
        own = self.source.path / tokenizer_file.FILE
        if self.named is None and own.is_file():
            check_inside(own, self.source.path)
        lengths = (self.model.seq_length, self.source.config, self.model.vocab_size)
        self.left_out += hf_tokenizer.copy_tokenizer(self.named or own, self.target, *lengths)

    def _loaded(self) -> Tokenizer:
        """The staged tokenizer. An error about it names the folder that it was copied from."""
        try:
            return tokenizer_file.load(str(self.target / tokenizer_file.FILE), Path())
        except Mistake as mistake:
            raise Mistake(str(mistake).replace(str(self.target), str(self.origin))) from None

    def _matched(self, tokenizer: Tokenizer) -> Tokenizer:
        """A tokenizer that gives the ids of transformers' tokenizer: the staged one, or else transformers' own backend in its place.

        transformers may change what tokenizer.json holds: by add_prefix_space or add_bos_token, or because it makes a class anew.
        """
        source, file = self.source.path, self.target / tokenizer_file.FILE
        files = [path for name in hf_tokenizer.READ if (path := source / name).is_file() and check_inside(path, source)]
        with private_view(files, {CONFIG: self.source.config}) as folder:
            try:
                theirs = tokenizer_parity.their_tokenizer(folder, source)
            except Mistake as mistake:
                self.left_out.append(f"token ids were not compared: {str(mistake).partition(' → ')[0]}")
                return tokenizer
        first = self.ids = tokenizer_parity.compare(tokenizer, theirs)
        if first.difference and hasattr(theirs, "backend_tokenizer"):
            file.write_text(theirs.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
            hf_tokenizer.leave_out_tokens(file, self.model.vocab_size)
            tokenizer = self._loaded()
            self.ids = tokenizer_parity.compare(tokenizer, theirs)
        way_out = f"--tokenizer {source / tokenizer_file.FILE} takes the file as it is"
        if self.ids.difference:
            raise Mistake(f"transformers gives other ids: {self.ids.difference} → {way_out}")
        if first.difference:
            other = f"{tokenizer_file.FILE} as it stands: transformers' {type(theirs).__name__} gives other ids, which are taken"
            self.left_out.append(f"{other}: {first.difference} → {way_out}")
        if self.ids.tail and not (isinstance(self.model, T5) and self.ids.tail == (tokenizer.end_of_text,)):  # the end of a source
            self.left_out.append(
                f"{tokenizer.decode(self.ids.tail)!r:.40} at the end of a text: training puts end-of-text there, prompts nothing"
            )
        return tokenizer
