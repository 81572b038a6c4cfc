"""`--json` of the verbs: the result as JSON on standard output, what a person reads on standard error. Imports no torch."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from research.cli.verbs import Parser
from research.tracking import format as fmt
from research.tracking.metrics import finite
from research.tracking.streams import encodes_unicode


def add_json_option(parser: Parser, what: str) -> None:
    """Adds --json. `what` says what is printed."""
    parser.add_argument("--json", action="store_true", help=f"{what} as JSON; everything else goes to standard error")


def print_json(value: Any) -> None:
    """Prints a value as strict JSON on one line: numbers that are not finite are "nan", "inf" and "-inf".

    An output that cannot write every character gets ASCII with JSON's own escapes, which any reader turns back into the same text.
    """
    value = finite(value)
    line = fmt.json_line(value) if encodes_unicode(sys.stdout) else json.dumps(value, allow_nan=False)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def only_json_on_stdout(as_json: bool) -> Iterator[None]:
    """Sends to standard error what the body prints, if `as_json`."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
