"""The sandbox process that renders a chat template, which is a program by a stranger: limited memory, no files, killed when too slow.

jinja2's sandbox keeps the template from reaching Python objects; the limits of the process keep it from using up the machine. The
environment and its functions are those that transformers gives to a chat template. This module does not import torch, so that the
process starts quickly.
"""

import datetime
import json
import signal
from multiprocessing.connection import Connection
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from research.cluster.limited_process import limit_address_space

MEMORY = 2**29
"""Limit of the process's address space, in bytes."""
GENERATION = ("begin_of_generation", "end_of_generation")
"""The variables around what a template says is an answer; undefined ones are rendered as nothing."""
LARGEST = 2**22
"""Limit of a rendered conversation, in characters, unless the server sets another one."""


def run(source: str, largest: int, connection: Connection) -> None:
    """The main function of the process: receives lists of tables of variables as JSON, sends {"texts": […]} or {"error": …}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    limit_address_space(MEMORY)
    template: jinja2.Template | None = None
    while True:
        try:
            tables = json.loads(connection.recv_bytes())
        except EOFError:  # the server has ended
            return
        try:
            template = template or environment().from_string(source)
            answer: dict[str, Any] = {"texts": [render(template, variables, largest) for variables in tables]}
        except Exception as error:  # the template may raise anything, MemoryError and RecursionError included
            answer = {"error": f"{error}"[:300] or type(error).__name__}
        connection.send_bytes(json.dumps(answer).encode())


def render(template: jinja2.Template, variables: dict[str, Any], largest: int = LARGEST) -> str:
    """Returns the rendered text. Raises a ValueError if it is too long."""
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        if (size := size + len(part)) > largest:
            raise ValueError(f"the template writes more than {largest} characters")
    return "".join(parts)


def environment() -> ImmutableSandboxedEnvironment:
    """A sandboxed environment without a loader, so that a template can include no other one."""

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        # jinja2's own filter escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    sandboxed = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    sandboxed.filters["tojson"] = tojson
    sandboxed.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=DictFunction(), namespace=PublicNamespace)
    return sandboxed


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the assistant's turns for training.

    Its content is rendered between the variables GENERATION, which a server does not set.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Returns the statements inside the block, between the two variables."""
        line = next(parser.stream).lineno
        begin, end = (nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in GENERATION)
        return [begin, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]


class PublicNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, which could lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r:.60} begins with an underscore")


class DictFunction:
    """`dict(…)` and `dict.fromkeys(…)` in a template, without the other attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        """Returns dict.fromkeys of the same arguments."""
        return dict.fromkeys(*args, **kwargs)
