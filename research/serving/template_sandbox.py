"""A process of its own in which a chat template, a program by a stranger, is rendered: little memory, no files, killed when it is late.

jinja2's sandbox keeps it from Python; the limits of the process from eating this machine. Environment and functions are those that
transformers gives to a chat template. Imports no torch.
"""

import contextlib
import datetime
import json
import resource
import signal
from multiprocessing.connection import Connection
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 2**29
"""Bytes of address space."""
LARGEST = 2**22
"""Characters of a conversation that is laid out."""


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the assistant's turns for training: here it is what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """jinja2's, without names that begin with an underscore, which could lead to Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, told = args[0], dict(*args[1:], **kwargs)
        for name in told:
            _refuse_private(name)
        Namespace.__init__(self, told)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class Table:
    """`dict(…)` in a template, and nothing more of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        """As dict's."""
        return dict.fromkeys(*args, **kwargs)


def environment() -> ImmutableSandboxedEnvironment:
    """Sandboxed, without a loader: a template can include no other one."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = _tojson
    found.globals.update(raise_exception=_raise, strftime_now=_now, dict=Table(), namespace=PublicNamespace)
    return found


def render(template: jinja2.Template, told: dict[str, Any]) -> str:
    """The text; a ValueError where it is too long."""
    parts, size = [], 0
    for part in template.generate(**told):
        parts.append(part)
        if (size := size + len(part)) > LARGEST:
            raise ValueError(f"the template writes more than {LARGEST} characters")
    return "".join(parts)


def serve(source: str, line: Connection) -> None:
    """The process's whole life: tables of variables as JSON come in, {"text": …} or {"error": …} go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template: jinja2.Template | None = None
    while True:
        try:
            told = json.loads(line.recv_bytes())
        except EOFError:  # the server is gone
            return
        try:
            template = template or environment().from_string(source)
            answer = {"text": render(template, told)}
        except Exception as error:  # whatever a stranger's program may raise, MemoryError and RecursionError among it
            answer = {"error": f"{error}"[:300] or type(error).__name__}
        line.send_bytes(json.dumps(answer).encode())


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Not jinja2's, which writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r:.60} begins with an underscore")
