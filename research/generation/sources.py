"""What a model that was trained on sources and targets reads of a text: a source with the tokens around it, as in its samples."""

from dataclasses import dataclass

from models.encoder_config import T5
from research.config import Experiment, Pairs
from research.data.pair_inputs import separator_of
from research.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceForm:
    """The tokens around a source and a target."""

    end: int
    """Follows the tokens of a source."""
    start: int | None
    """What a decoder with an encoder reads first; None: a decoder-only model continues the source."""

    def ids(self, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
        """The source's tokens as the model reads them."""
        return (*tokenizer.encode(text), self.end)


def source_form(experiment: Experiment, tokenizer: Tokenizer) -> SourceForm | None:
    """That of the experiment's samples: the separator of pairs, or end-of-text without pairs. None if its texts continue their prompts."""
    examples, has_encoder = experiment.data.examples, isinstance(experiment.model, T5)
    if not (has_encoder or isinstance(examples, Pairs)):
        return None
    token = separator_of(tokenizer, examples.separator) if isinstance(examples, Pairs) else tokenizer.end_of_text
    return SourceForm(token, token if has_encoder else None)
