"""Base class of the settings groups, whose errors are Mistakes: pydantic validates, `refusal` turns its errors into one sentence.

Imports no torch.
"""

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from parallel.errors import Mistake, listed, nearest

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*\z")]
"""Not empty, and without a zero byte, which no path may have."""
UNKNOWN = ("extra_forbidden", "no_such_attribute")
"""pydantic's error types for a name that is not a setting."""
WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "True or False",
    dict: "a table of JSON values",
    type(None): "None",
}
"""What an error message calls a type."""
LONGEST = 60
"""The most characters of a refused value that are shown."""
MOST = 20
"""The most names that one sentence lists."""
LARGEST = 2**32 - 1
"""The largest whole number that a setting may be. It is also the largest seed that numpy takes."""


class Settings(BaseModel):
    """A group of settings. Construction and assignment raise Mistake; a refused assignment leaves the old value.

    `SECTION` is the group's name in the experiment: `model` for settings written as model.num_heads.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)
    SECTION: ClassVar[str] = ""

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses whole numbers that are no size, count or seed: arithmetic with them overflows, or takes for ever."""
        if isinstance(value, int) and value > LARGEST:
            name = f"{cls.SECTION}.{info.field_name}" if cls.SECTION else info.field_name
            shown = f"{value:,}" if value < 10**20 else "a number of more than 20 digits"
            raise ValueError(f"{name} = {shown} is too large → use at most {LARGEST:,}")
        return value

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


def refusal(error: ValidationError, group: type[BaseModel]) -> Mistake:
    """One sentence for the most telling problem: an unknown name, then a validator's own sentence, a wrong value, a missing setting."""
    section = getattr(group, "SECTION", "")
    problems: list[Any] = [{**problem, "loc": _place(group, problem["loc"])} for problem in error.errors(include_url=False)]
    problems.sort(key=_rank)
    first = problems[0]
    if _rank(first) == 0:
        candidates = names(_owner(group, first["loc"]), _dotted(section, first["loc"][:-1]))
        return unknown(_dotted(section, first["loc"]), candidates)
    if _rank(first) == 1:
        return Mistake(str(first["ctx"]["error"]))
    if _is_absent(first):
        absent = [_dotted(section, problem["loc"]) for problem in problems if _is_absent(problem)]
        return Mistake(f"{listed(absent, 'and')} {'is' if len(absent) == 1 else 'are'} missing → give every setting that has no default")

    # a wrong value: the innermost field of the schema on the way to it says what is needed
    loc = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
    name, owner, field = _dotted(section, loc), _owner(group, loc), None
    for part in loc:
        field = owner.model_fields.get(part, field) if isinstance(part, str) else field
    if field is None:  # raised by a validator of a whole group, without a sentence of its own
        return Mistake(f"{name or section or group.__name__}: {first['msg']} → see its description in launch.py --help")
    value = repr(first["input"])
    shown = value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
    return Mistake(f"{name} = {shown} does not work → use {needs(field)}")


def unknown(name: str, candidates: Iterable[str]) -> Mistake:
    """A Mistake for a `name` that is none of the dotted `candidates`. It names the nearest, or else all of them if they are few."""
    candidates = list(candidates)
    near = nearest(name, candidates)
    known = f"use {listed(candidates)}" if len(candidates) <= MOST else "launch.py --help lists them all"
    return Mistake(f"{name or repr(name)} is not a setting → {f'did you mean {near}?' if near else known}")


def names(group: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting of `group` and of the groups in it, the groups themselves included."""
    for name, field in group.model_fields.items():
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted
        yield from dict.fromkeys(inner for kind in groups_of(field) for inner in names(kind, dotted))


def groups_of(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The classes that a group of settings may be: one, or for `model` one for each kind of model. None if the field is a value."""
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    kinds = get_args(field.annotation) if is_union else (field.annotation,)
    return kinds if all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds) else ()


def is_group(field: FieldInfo) -> bool:
    """Whether the field is a group of settings rather than a value."""
    return bool(groups_of(field))


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
    """The words for pydantic's constraints: 'at least 0'."""
    for bound in constraints:
        if isinstance(bound, FieldInfo):
            yield from _bounds(bound.metadata)
        for constraint, attribute, words in (
            (annotated_types.Gt, "gt", "greater than"),
            (annotated_types.Ge, "ge", "at least"),
            (annotated_types.Lt, "lt", "below"),
            (annotated_types.Le, "le", "at most"),
        ):
            if isinstance(bound, constraint):
                yield f"{words} {getattr(bound, attribute)}"
        if isinstance(bound, annotated_types.MinLen):  # the schema uses no other length than 1
            yield "that is not empty"
        if getattr(bound, "pattern", None) is not None:  # the schema uses no other pattern
            yield "has no zero byte"
        if isinstance(bound, annotated_types.MaxLen):
            yield f"has at most {bound.max_length} characters"


def _rank(problem: Any) -> int:
    """How early a problem is reported: 0 unknown name, 1 a validator's own sentence, 2 wrong value, 3 missing setting."""
    if problem["type"] in UNKNOWN:
        return 0
    if "→" in str(problem.get("ctx", {}).get("error", "")):
        return 1
    return 3 if _is_absent(problem) else 2


def _is_absent(problem: Any) -> bool:
    """Whether a setting was not given. A missing second value of a tuple is part of a wrong value instead."""
    return problem["type"] == "missing" and isinstance(problem["loc"][-1], str)


def _place(group: type[BaseModel] | None, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """`loc` without the words with which pydantic tells the types of a union apart."""
    place: list[int | str] = []
    is_union = False
    for part in loc:
        if is_union and isinstance(part, str):
            continue
        place.append(part)
        field = group.model_fields.get(str(part)) if group else None
        if field is not None:
            is_union = get_origin(field.annotation) in (Union, types.UnionType)
            group = next(iter(groups_of(field)), None)  # a group of several kinds reports what is wrong in it itself
    return tuple(place)


def _owner(group: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The group that holds the setting at `loc`."""
    for part in loc[:-1]:
        field = group.model_fields.get(str(part))
        if field is None or not is_group(field):
            break
        group = groups_of(field)[0]
    return group


def _dotted(section: str, loc: tuple[int | str, ...]) -> str:
    """('betas', 1) in section 'optimizer' -> 'optimizer.betas[1]'."""
    name = section
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name
