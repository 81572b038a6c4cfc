"""Settings that refuse in our words: pydantic validates, one function turns what it found into a Mistake. Imports no torch."""

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from parallel.errors import Mistake, listed, nearest

UNKNOWN = ("extra_forbidden", "no_such_attribute")
WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "True or False",
    dict: "a table of JSON values",
    type(None): "None",
}
LONGEST = 60
"""Characters of a refused value that are shown."""
MOST = 20
"""Names that are listed in one sentence."""


class Settings(BaseModel):
    """A group of settings. Construction and assignment raise Mistake; a refused assignment leaves the old value.

    `SECTION` is the group's name in the experiment: `model` for settings written as model.num_heads.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)
    SECTION: ClassVar[str] = ""

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise refusal(error, type(self)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:  # on a copy first: pydantic runs a model's validators after the new value is already in place
            BaseModel.__setattr__(self.model_copy(), name, value)
        except ValidationError as error:
            raise refusal(error, type(self)) from None
        super().__setattr__(name, value)


def refusal(error: ValidationError, kind: type[BaseModel]) -> Mistake:
    """One sentence for the most telling problem: an unknown name, then a sentence of a validator's own, a value, a missing one."""
    section = getattr(kind, "SECTION", "")
    problems = sorted(error.errors(include_url=False), key=_telling)
    first = problems[0]
    if first["type"] in UNKNOWN:
        owner = _owner(kind, first["loc"])
        return unknown(_dotted(section, first["loc"]), names(owner, _dotted(section, first["loc"][:-1])))
    if _own_sentence(first):
        return Mistake(str(first["ctx"]["error"]))
    if _is_absent(first):
        return _missing([_dotted(section, problem["loc"]) for problem in problems if _is_absent(problem)])
    return _wrong_value(first, kind, section)


def unknown(name: str, candidates: Iterable[str]) -> Mistake:
    """`name` is none of `candidates` (dotted names): names the nearest, or all where none is near and they are few."""
    candidates = list(candidates)
    near = nearest(name, candidates)
    known = f"use {listed(candidates)}" if len(candidates) <= MOST else "launch.py --help lists them all"
    return Mistake(f"{name or repr(name)} is not a setting → {f'did you mean {near}?' if near else known}")


def names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting of `kind` and of the groups in it, the groups themselves included."""
    for name, field in kind.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted
        if is_group(field):
            yield from names(field.annotation, dotted)  # type: ignore[arg-type]


def is_group(field: FieldInfo) -> bool:
    """Whether the field is a group of settings rather than a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def needs(field: FieldInfo) -> str:
    """What a field accepts, in words: 'a whole number greater than 0'."""
    return _needs(field.annotation, field.metadata)


def _needs(annotation: Any, bounds: Iterable[Any] = ()) -> str:
    if get_origin(annotation) is Annotated:
        return _needs(annotation.__origin__, annotation.__metadata__)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_needs(part, () if part is type(None) else bounds) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return listed(get_args(annotation))
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is ...:
        return f"any number of values, each {_needs(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} values, each {_needs(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{annotation.__name__}(…)"
    words = WORDS.get(get_origin(annotation) or annotation, str(annotation))
    return " ".join([words, *filter(None, [" and ".join(_bounds(bounds))])])


def _bounds(constraints: Iterable[Any]) -> Iterator[str]:
    for bound in constraints:
        if isinstance(bound, FieldInfo):
            yield from _bounds(bound.metadata)
        for kind, attribute, words in (
            (annotated_types.Gt, "gt", "greater than"),
            (annotated_types.Ge, "ge", "at least"),
            (annotated_types.Lt, "lt", "below"),
            (annotated_types.Le, "le", "at most"),
        ):
            if isinstance(bound, kind):
                yield f"{words} {getattr(bound, attribute)}"
        if isinstance(bound, annotated_types.MinLen):  # only ever 1 here
            yield "that is not empty"


def _telling(problem: Any) -> int:
    if problem["type"] in UNKNOWN:
        return 0
    if _own_sentence(problem):
        return 1
    return 3 if _is_absent(problem) else 2


def _is_absent(problem: Any) -> bool:
    """A setting that was not given; the second of two values is not one, but a part of a wrong value."""
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], str)


def _own_sentence(problem: Any) -> bool:
    return "→" in str(problem.get("ctx", {}).get("error", ""))


def _missing(absent: list[str]) -> Mistake:
    are = "is" if len(absent) == 1 else "are"
    return Mistake(f"{listed(absent, 'and')} {are} missing → give every setting that has no default")


def _wrong_value(problem: Any, kind: type[BaseModel], section: str) -> Mistake:
    loc = problem["loc"][:-1] if problem["type"] == "missing" else problem["loc"]
    name, value = _dotted(section, loc), shown(problem["input"])
    owner, field = _owner(kind, loc), None
    for part in loc:
        field = owner.model_fields.get(part, field) if isinstance(part, str) else field
    if field is None:  # a validator of a whole group that did not say what would work
        return Mistake(f"{name or section or kind.__name__}: {problem['msg']} → see its description in launch.py --help")
    return Mistake(f"{name} = {value} does not work → use {needs(field)}")


def shown(value: Any) -> str:
    """repr, cut short."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _owner(kind: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The group that holds the setting at `loc`."""
    for part in loc[:-1]:
        field = kind.model_fields.get(str(part))
        if field is None or not is_group(field):
            break
        kind = field.annotation  # type: ignore[assignment]
    return kind


def _dotted(section: str, loc: tuple[int | str, ...]) -> str:
    name = section
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name
