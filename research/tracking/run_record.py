"""run.json as every reader of somebody's run folder reads it: typed, so that a field of the wrong type is one sentence that names it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parallel.errors import Mistake
from research.tracking.run_folder import RunFolder, read_run

WAY_OUT = "restore it, or move the folder away"
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Record(BaseModel):
    """The fields that are read, if they are there. Others are left as they are."""

    model_config = ConfigDict(strict=True, extra="ignore")

    status: str = "unknown"
    started: str = ""
    ended: str | None = None
    reason: str | None = None
    layout: str = ""
    precision: str = ""
    steps: Count | None = None
    commit: str | None = None
    dirty: bool | None = None
    overrides: list[Annotated[list[Any], Field(min_length=3, max_length=3)]] = []
    segments: list[dict[str, Any]] = []


def read(folder: RunFolder) -> dict[str, Any]:
    """All of run.json; the fields above have their types, or a default if they are missing.

    Raises a Mistake if it cannot be read, or a field has another type.
    """
    try:
        table = read_run(folder)
    except OSError as error:
        raise Mistake(f"{folder.run} cannot be read ({error.strerror}) → {WAY_OUT}") from None
    try:
        record = _Record(**{name: table[name] for name in _Record.model_fields if name in table})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise Mistake(f"{folder.run}: {field} = {first['input']!r:.60} is not what a run writes ({first['msg']}) → {WAY_OUT}") from None
    return {**record.model_dump(), **table}
