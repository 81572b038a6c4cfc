"""`python -m research generate RUN`: a trained model continues prompts, one as it writes, a file's in batches."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from research.generate_task import Task, parser, prepared
from research.trained import ROOT

if TYPE_CHECKING:
    from research.writer import Writer


def main(argv: list[str]) -> None:
    """Prints the texts; JSON lines for a file."""
    task = prepared(parser().parse_args(argv))
    from research.generate_output import write  # torch begins here

    with ready(task) as writer:
        write(task, writer)


@contextlib.contextmanager
def ready(task: Task) -> Iterator["Writer"]:
    """The model, restored, on as many tensor ranks as asked for."""
    from research.hf_tokenizer import ends_of
    from research.restore import Plan
    from research.tensor_ranks import opened
    from research.writer import Writer

    plan = Plan(task.folder.path, task.checkpoint, task.arguments.precision, task.at_once, task.places)
    with opened(plan, task.arguments.tensor) as decoder:
        yield Writer(decoder, task.tokenizer, task.experiment.model, task.context, ends_of(task.tokenizer, ROOT))
