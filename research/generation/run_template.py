"""The chat template of a run: the one beside its tokenizer, one that the user names, or the plain layout."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import TEMPLATE, special_tokens_of, template_of
from research.generation.chat_template import ChatTemplate, PlainTemplate, TemplateRenderer


@contextlib.contextmanager
def chat_template(
    tokenizer: Tokenizer,
    root: Path,
    end_ids: tuple[int, ...],
    seconds: float,
    characters: int,
    source: str | None = None,
    name: str = TEMPLATE,
) -> Iterator[PlainTemplate | ChatTemplate]:
    """Yields the template `source`, called `name`, else the one beside the tokenizer, else the plain layout.

    A conversation is rendered in a sandbox process within `seconds`, and may become `characters` long.
    """
    source = source or template_of(tokenizer, root)
    if source is None:
        yield PlainTemplate(tokenizer, end_ids)
        return
    renderer = TemplateRenderer(source, seconds, characters)
    try:
        yield ChatTemplate(tokenizer, renderer.render, special_tokens_of(tokenizer, root), end_ids, name)
    finally:
        renderer.close()
