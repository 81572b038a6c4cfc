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
    """That of the experiment's samples: the separator of pairs; without pairs end-of-text, and model.start_token if it is set.

    None if its texts continue their prompts.
    """
    examples, model = experiment.data.examples, experiment.model
    if isinstance(examples, Pairs):
        separator = separator_of(tokenizer, examples.separator)
        return SourceForm(separator, separator if isinstance(model, T5) else None)
    if not isinstance(model, T5):
        return None
    return SourceForm(tokenizer.end_of_text, tokenizer.end_of_text if model.start_token is None else model.start_token)
