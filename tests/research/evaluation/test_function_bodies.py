"""The task python_bodies: what counts as a one-line body, by examples and on Python's library, against its own parser."""

import ast
import dataclasses
from pathlib import Path

import pytest

from research.data import tokenizer
from research.data.fill_in_middle import Sentinels
from research.evaluation import registry
from research.evaluation.function_bodies import bodies
from research.evaluation.task import Settings
from tests.research.helpers.example import sentence

CODE = '''\
def one(x):
    return x + 1  # a comment

def with_docstring(x):
    """Says 'é'."""
    yield "é", x

class Class:
    async def method(self):
        await self

    def two(self):
        a = 1
        return a

    def long(self):
        return (
            1
        )

    def same_line(self): return 1

    def two_on_a_line(self):
        a = 1; return a

    def only_a_docstring(self):
        """Nothing."""

def outer():
    def inner():
        pass
'''


def test_one_line_bodies(tmp_path):
    """In a file with \\r\\n, with a form feed inside of a text, and with letters of several bytes in front of a body."""
    path = tmp_path / "code.py"
    path.write_text(CODE)
    assert [fields["middle"] for _, fields in bodies(path)] == [
        "\n    return x + 1",
        '\n    yield "é", x',
        "\n        await self",
        "\n        pass",
    ]
    path.write_bytes("def a():\r\n    return 'é\x0c'\r\nx = 'é'\n\ndef b():\n\treturn 2".encode())
    found = [fields for _, fields in bodies(path)]
    assert [fields["middle"] for fields in found] == ["\r\n    return 'é\x0c'", "\n\treturn 2"]
    assert [fields["prefix"][-2:] + "|" + fields["suffix"][:3] for fields in found] == ["):|\r\nx", "):|"]
    for fields in found:
        assert "".join(fields[name] for name in ("prefix", "middle", "suffix")).encode() == path.read_bytes()


def test_the_library_with_a_body_replaced_parses_to_a_function_with_that_body():
    """For every 40th body: with a number in its place, one statement of the file has changed."""
    (task,) = registry.create_tasks(["python_bodies"])
    rows = list(task.rows())
    assert len(rows) > 200
    for row in rows[::40]:
        fields = row.fields
        middles = fields["middle"], _number(fields["middle"])
        whole, replaced = (ast.parse(fields["prefix"] + middle + fields["suffix"]) for middle in middles)
        count = [statements(tree, fields["middle"].strip()) for tree in (whole, replaced)]
        assert count in ([0, 0], [count[1] + 1, count[1]])  # [0, 0]: it is not written as ast writes it


def _number(middle):
    """The middle with a number instead of its statement."""
    return middle[: len(middle) - len(middle.lstrip())] + "12345"


def statements(tree, text):
    """How many statements of the tree ast writes as this text."""
    return sum(ast.unparse(node) == text for node in ast.walk(tree) if isinstance(node, ast.stmt))


def test_digest_and_mistakes(context, tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    (task,) = registry.create_tasks([f"python_bodies:{path}"], Settings(limit=2))
    small = dataclasses.replace(context, tokenizer=tokenizer.fixed("builtin:bytes+fim"), sentinels=Sentinels(257, 258, 259), length=65)
    made, before = task.texts(small), task.digest(small)
    assert made.examples == 2 and made.requests[0].ids == (257, *b"def one(x):", 258, *b"  # a comment\n\ndef", 259)
    path.write_text(CODE.replace("x + 1", "x + 2"))
    assert task.digest(small) != before
    for text, said in (("x = (", "cannot be read as Python code (SyntaxError"), ("x = 1\n", "has no function whose body is one line")):
        path.write_text(text)
        assert said in sentence(lambda: task.texts(small))
    with pytest.raises(Exception, match="is not a kind of file that this task reads"):
        registry.create_tasks([f"python_bodies:{Path(__file__).parent / 'x.jsonl'}"])
