"""Edits settings in the text of a config.py by source position, so that comments and formatting stay as they are.

A setting is looked for from `config = Experiment(…)` on: in keywords of the calls, in dictionaries, behind names that the file assigns
once, and in later assignments such as `config.seed = 2`. What is found is replaced by a literal; a setting that is not written is added
to its group's call, and a group that is missing with its import. The file is not run here: whoever edits loads the result and compares.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from parallel.errors import Mistake
from research.ablation.source_text import SourceText, literal
from research.config import schema
from research.config.schema import Experiment
from research.config.settings import groups_of, is_group

CONFIG = "config"
MODULES = ("research.config", "research.config.schema")
GROUPS = {name: [kind.__name__ for kind in groups_of(field)] for name, field in Experiment.model_fields.items() if is_group(field)}
"""Group of settings -> its classes: 'optimizer' -> ['Optimizer'], and 'model' -> one for each kind of model."""
CLASSES = {"Experiment", *(name for kinds in GROUPS.values() for name in kinds)}
LONGEST_LINE = 140
"""Columns from which on a tuple is written with one entry per line."""
DEEPEST = 50
"""The most names, calls and dictionaries on the way to one setting."""
WAY_OUT = "write config = Experiment(…) with its groups and values there, or edit a copy by hand"


def with_settings(text: str, values: Mapping[str, Any], path: str) -> tuple[str, dict[str, int]]:
    """The text of a config.py in which the settings of dotted names have these values, and the line of each edit, by name.

    `path` is what a Mistake calls the file. It names the line where the file decides a setting in a way that cannot be edited. Lines are
    those of `text`, into which an edit may put more.
    """
    source, lines = SourceText(text), {}
    for name, value in values.items():
        editor = _Editor(source, name, path)
        editor.edited(literal(value))
        lines[name] = editor.line
    for name, value in values.items():
        code = literal(value)
        edited = _Editor(SourceText(text), name, path).edited(code)
        written = next((line for line in edited.split("\n") if code in line), "")
        if isinstance(value, tuple) and len(written) > LONGEST_LINE:
            indent = written[: len(written) - len(written.lstrip())]
            entries = "".join(f"{indent}    {literal(entry)},\n" for entry in value)
            edited = _Editor(SourceText(text), name, path).edited(f"(\n{entries}{indent})")
        text = edited
    return text, lines


class _Editor:
    """The edit of one setting."""

    def __init__(self, source: SourceText, name: str, path: str) -> None:
        self.source, self.name, self.path = source, name, path
        self.line = 1
        self.depth = 0
        self.imported = {
            alias.asname or alias.name: alias.name
            for node in source.tree.body
            if isinstance(node, ast.ImportFrom) and (node.module in MODULES or node.module == "models.config")
            for alias in node.names
        }
        """Names of the file that stand for what it imports of the settings."""

    def edited(self, code: str) -> str:
        """The whole text after the edit."""
        parts = self.name.split(".")
        start, rest = self._assigned(CONFIG, self.source.tree), parts
        for statement in self.source.tree.body:  # config.model = …, config.model.norm = …
            for target, value in _assignments(statement):
                path = _attributes(target)
                if path[:1] == [CONFIG] and len(path) > 1 and parts[: len(path) - 1] == path[1:]:
                    if value is None:
                        raise self._refusal(statement)
                    start, rest = value, parts[len(path) - 1 :]
        return self._set(start, rest, code)

    def _set(self, node: ast.expr, rest: Sequence[str], code: str) -> str:
        """The text in which the setting `rest` of what `node` evaluates to is `code`."""
        self.line, self.depth = node.lineno, self.depth + 1
        if not rest:
            return self.source.replaced(node, code)
        if self.depth > DEEPEST:
            raise self._refusal(node)
        if isinstance(node, ast.Name):
            return self._set(self._assigned(node.id, node), rest, code)
        if isinstance(node, ast.Dict):
            return self._set_in_dict(node, rest, code)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):  # the right-hand dictionary wins
            return self._set(node.right, rest, code)
        if isinstance(node, ast.Call) and self._class(node.func) in (*CLASSES, "dict"):
            return self._set_in_call(node, rest, code)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "model_copy":
            update = next((keyword.value for keyword in node.keywords if keyword.arg == "update"), None)
            if isinstance(update, ast.Dict) and len(rest) == 1:
                return self._set_in_dict(update, rest, code)
            if update is not None and (holder := self._holder(update, rest[0])) is not None:
                return self._set(holder, rest, code)
            return self._set(node.func.value, rest, code)
        raise self._refusal(node)

    def _set_in_call(self, call: ast.Call, rest: Sequence[str], code: str) -> str:
        """In a call of a settings class, or of dict."""
        for keyword in call.keywords:
            if keyword.arg == rest[0]:
                return self._set(keyword.value, rest[1:], code)
        if (holder := self._holder(call, rest[0])) is not None:
            return self._set(holder, rest, code)

        # it is not written: a new keyword behind the one that the schema has before it
        source, entry, owner = self.source, f"{rest[0]}={code}", self._class(call.func)
        fields = list(getattr(schema, owner).model_fields) if owner in CLASSES else []
        if owner == "dict" or rest[0] not in fields:
            fields = [rest[0]]
        if len(rest) == 2:
            source, name = self._with_import(call, GROUPS[rest[0]][0])
            entry = f"{rest[0]}={name}({rest[1]}={code})"
            call = next(
                node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and source.number(node) == self.source.number(call)
            )
            self.line = call.lineno
        before = [keyword for keyword in call.keywords if keyword.arg in fields[: fields.index(rest[0])]]
        after = max(before, key=lambda keyword: fields.index(keyword.arg or ""), default=None)
        entries: list[ast.expr | ast.keyword] = sorted([*call.args, *call.keywords], key=source.start)
        return source.with_entry(call, entries, after, entry)

    def _set_in_dict(self, found: ast.Dict, rest: Sequence[str], code: str) -> str:
        """In a dictionary that is written as {…}."""
        for key, value in reversed(list(zip(found.keys, found.values, strict=True))):  # of a key that is there twice, the last counts
            if isinstance(key, ast.Constant) and key.value == rest[0]:
                return self._set(value, rest[1:], code)
        if (holder := self._holder(found, rest[0])) is not None:
            return self._set(holder, rest, code)
        if len(rest) > 1:
            raise self._refusal(found)
        return self.source.with_entry(found, found.values, None, f"{literal(rest[0])}: {code}")

    def _holder(self, node: ast.expr, key: str) -> ast.expr | None:
        """The dictionary, {…} or dict(…), that gives what `node` evaluates to the value of a key; None if the file does not tell."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._refusal(node)
        if isinstance(node, ast.Name):
            try:
                return self._holder(self._assigned(node.id, node), key)
            except Mistake:
                return None
        unpacked: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            unpacked = [node.left, node.right]
        elif isinstance(node, ast.Dict):
            if any(isinstance(name, ast.Constant) and name.value == key for name in node.keys):
                return node
            unpacked = [value for name, value in zip(node.keys, node.values, strict=True) if name is None]
        elif isinstance(node, ast.Call) and self._class(node.func) in (*CLASSES, "dict"):
            if any(keyword.arg == key for keyword in node.keywords):
                return node
            unpacked = [keyword.value for keyword in node.keywords if keyword.arg is None]
        return next((holder for inner in reversed(unpacked) if (holder := self._holder(inner, key)) is not None), None)

    def _assigned(self, name: str, used: ast.AST) -> ast.expr:
        """The value of the only assignment to a name; a Mistake if there is none at the top of the file, or more than one."""
        tree = self.source.tree
        stores = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)]
        values = [(value, target) for statement in tree.body for target, value in _assignments(statement) if target in stores]
        self.depth += 1
        if len(stores) != 1 or len(values) != 1 or values[0][0] is None or self.depth > DEEPEST:
            raise self._refusal(stores[-1] if stores else used, name)
        return values[0][0]

    def _class(self, function: ast.expr) -> str:
        """What a call calls, as the schema names it: 'GPT' for GPT(…), for an alias of it and for config.GPT(…)."""
        if isinstance(function, ast.Attribute):
            return function.attr
        name = function.id if isinstance(function, ast.Name) else ""
        return self.imported.get(name, name)

    def _with_import(self, call: ast.Call, wanted: str) -> tuple[SourceText, str]:
        """The text in which a settings class can be called beside `call`, and how the file names it."""
        if isinstance(call.func, ast.Attribute):  # config.Experiment(…)
            return self.source, f"{ast.unparse(call.func.value)}.{wanted}"
        for name, original in self.imported.items():
            if original == wanted:
                return self.source, name
        imports = [node for node in self.source.tree.body if isinstance(node, ast.ImportFrom) and node.module in MODULES]
        if not imports:
            raise self._refusal(call)
        if any(alias.name == "*" for node in imports for alias in node.names):
            return self.source, wanted
        return SourceText(self.source.with_name(imports[0], wanted)), wanted

    def _refusal(self, node: ast.AST, name: str = "") -> Mistake:
        """The Mistake that names the line where the setting cannot be followed."""
        line = getattr(node, "lineno", 1)
        shown = name if name else " ".join(ast.unparse(node).split())
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        return Mistake(f"{self.path}:{line}: {self.name} comes from `{shown}`, which cannot be edited → {WAY_OUT}")


def _assignments(statement: ast.stmt) -> list[tuple[ast.expr, ast.expr | None]]:
    """(target, value) of a statement that assigns to names or attributes; None for a value that no expression gives."""
    if isinstance(statement, ast.Assign):
        return [(target, statement.value) for target in statement.targets]
    if isinstance(statement, ast.AnnAssign):
        return [(statement.target, statement.value)]
    return [(statement.target, None)] if isinstance(statement, ast.AugAssign) else []


def _attributes(target: ast.expr) -> list[str]:
    """['config', 'model', 'norm'] for config.model.norm; [] for anything but attributes of a name."""
    if isinstance(target, ast.Name):
        return [target.id]
    inner = _attributes(target.value) if isinstance(target, ast.Attribute) else []
    return [*inner, target.attr] if inner and isinstance(target, ast.Attribute) else []
