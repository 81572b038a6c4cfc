"""Settings and options from the command line. tyro reads types and draws --help; every refusal is a sentence of ours."""

import contextlib
import io
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from parallel.errors import Mistake
from research.config.schema import Experiment
from research.config.serialization import build
from research.config.settings import names, needs, unknown

Override = tuple[str, Any, Any]
"""(dotted setting, value in the file, value on the command line)."""


HELP = ("--help", "-h")
FLAGS = ("dry_run", "verbose")
OPTIONS = ("--resume", "--dry-run", "--verbose", "--help")
RESUME = "resume"
LOCAL_RANK = "local_rank"
TABLE = "deepspeed"
AS_WRITTEN = (tyro.conf.FlagConversionOff,)
"""True and False are written out, on the command line as in the file."""
USAGE = """start it, from any folder:
  {ranks} ranks here:{space}deepspeed --num_gpus {ranks} {path}{cut}
  a cluster:       deepspeed --hostfile hosts {path}
  Slurm:           srun --ntasks-per-node {ranks} python {path}{cut}
  or else:         torchrun --nproc_per_node {ranks} {path}{cut}
  one rank:        python {path}{uncut}

beside settings:
  --resume    auto: go on with this experiment's newest unfinished run, or begin one · RUN or CHECKPOINT: go on with that one ·
              never (the default): begin a new run. The layout may be another one, the model and the data may not
  --dry-run   resolve everything, print the layout and the batch arithmetic, train nothing
  --verbose   show what DeepSpeed and W&B have to say
  --help      this text

Any setting below may follow as --group.name value, with dashes or underscores, and is recorded with the run.
"default" is its value in this experiment's config.py. The deepspeed table can be changed there only.
Ranks = pipe × data × tensor: the data-parallel size is what pipe and tensor leave."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for beside settings."""

    resume: str = "never"
    """auto, never, or what names a run or a checkpoint."""
    dry_run: bool = False
    verbose: bool = False
    help: bool = False


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Experiment, list[Override], Options]:
    """The experiment with the command line's settings, the ones that changed as (dotted name, old, new), and the options.

    Settings are applied together, so `--model.num_heads 8 --model.num_kv_heads 8` is judged as a whole. Of a setting given
    twice the last counts. `--local_rank`, which deepspeed's launcher puts first, is accepted and left to the environment.
    """
    if any(word in HELP for word in argv):
        return experiment, [], Options(help=True)
    options, given = Options(), {}
    for name, words in _grouped(argv):
        if name in FLAGS:
            options = replace(options, **{name: _alone(name, words)})  # type: ignore[arg-type]
        elif name == RESUME:
            options = replace(options, resume=_one(name, words))
        elif name != LOCAL_RANK:
            given[name] = _read(_field(name), name, words, _get(experiment, name))
    changed = _with(experiment, given)
    overrides = [(name, _get(experiment, name), _get(changed, name)) for name in given]
    return changed, [override for override in overrides if override[1] != override[2]], options


def show_help(experiment: Experiment, path: str) -> None:
    """Print what the experiment asks, how to start it, and every setting with its value and meaning."""
    description = f"{experiment.question}\n\n{usage(experiment, path)}"
    shown = experiment.model_copy(update={TABLE: {}})  # an empty table is not listed
    with contextlib.suppress(SystemExit):
        tyro.cli(Experiment, prog=path, description=description, default=shown, args=["--help"], config=AS_WRITTEN, use_underscores=True)


def usage(experiment: Experiment, path: str) -> str:
    """How to start this experiment: on its own ranks where it names a layout of several, else on two for an example."""
    pipe, tensor = experiment.parallel.pipe, experiment.parallel.tensor
    uncut = [f" --parallel.{axis} 1" for axis, size in (("pipe", pipe), ("tensor", tensor)) if size > 1]
    ranks = pipe * tensor if uncut else 2
    example = "" if uncut else " --parallel.tensor 2"
    return USAGE.format(path=path, ranks=ranks, space=" " * (5 - len(str(ranks))), cut=example, uncut="".join(uncut))


def _grouped(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """['--a-b', '1', '2', '--c=3'] -> [('a_b', ['1', '2']), ('c', ['3'])]; nothing may follow what = has closed."""
    found: list[tuple[str, list[str]]] = []
    closed = True
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
            closed = bool(equals)
        elif closed:
            raise Mistake(f"{word!r} belongs to no setting → write --group.name value, for example --parallel.tensor 2")
        else:
            found[-1][1].append(word)
            closed = found[-1][0] == LOCAL_RANK
    return found


def _alone(name: str, words: list[str]) -> bool:
    if words:
        raise Mistake(f"--{name.replace('_', '-')} takes no value, got {' '.join(words)!r} → write it alone")
    return True


def _one(name: str, words: list[str]) -> str:
    if len(words) != 1:
        raise Mistake(f"--{name} takes one word, got {len(words)} → write --{name} auto, --{name} never, or --{name} runs/NAME/ID")
    return words[0]


def _field(name: str) -> FieldInfo:
    """The schema's field of a dotted name."""
    if name.partition(".")[0].partition("_")[0] == TABLE:
        raise Mistake(f"--{name}: {TABLE} is a table and lives in the file only → write {TABLE}={{…}} in config.py")
    fields, found = Experiment.model_fields, None
    for part in name.split("."):
        if (found := fields.get(part)) is None:
            break
        fields = getattr(found.annotation, "model_fields", {})
    if found is None:
        raise unknown(name, [*names(Experiment), *OPTIONS])
    if fields:
        raise Mistake(f"{name} is a group of settings → name one of them, for example --{name}.{next(iter(fields))}")
    return found


def _read(field: FieldInfo, name: str, words: list[str], current: Any) -> Any:
    """The words after a setting, as the field's type: text as it is, the rest by tyro."""
    if not words and field.annotation is bool:
        return True
    if _is_texts(field.annotation):
        return tuple(words)
    if not words:
        raise Mistake(f"--{name} has no value → give it {needs(field)}, now: {_written(current)}")
    if _is_text(field.annotation):
        if len(words) > 1:
            raise Mistake(f'--{name} takes one value, got {len(words)} → put quotes around it: --{name} "{" ".join(words)}"')
        return None if words == ["None"] and field.annotation is not str else words[0]
    value = _by_type(field.annotation, _separated(field.annotation, words))
    if value is REFUSED:
        raise Mistake(f"{name} = {' '.join(words)!r} does not work → use {needs(field)}")
    return value


REFUSED = object()
"""What `_by_type` returns for words that are not of the type."""


def _by_type(annotation: Any, words: list[str]) -> Any:
    """tyro's reading of `words` as `annotation`; its boxes go nowhere."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return tyro.cli(annotation, args=words, console_outputs=False)
        except SystemExit:
            return REFUSED


def _is_text(annotation: Any) -> bool:
    optional = get_origin(annotation) in (Union, types.UnionType)
    return str in (get_args(annotation) if optional else (annotation,))


def _is_texts(annotation: Any) -> bool:
    """Whether a setting is any number of texts: each word is one, whatever is in it."""
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is ... and _is_text(_bare(get_args(annotation)[0]))


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if get_origin(annotation) is Annotated else annotation


def _separated(annotation: Any, words: list[str]) -> list[str]:
    """'0.9,0.95' and '(0.9, 0.95)' are two words of a tuple; true and false are written as Python does."""
    if get_origin(annotation) is tuple:
        return " ".join(words).strip("()[]").replace(",", " ").split()
    return [word.capitalize() for word in words] if annotation is bool else words


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _get(experiment: Experiment, name: str) -> Any:
    value: Any = experiment
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _with(experiment: Experiment, given: dict[str, Any]) -> Experiment:
    """The experiment with these dotted settings replaced, validated as a whole."""
    if not given:
        return experiment
    settings = experiment.model_dump()
    for name, value in given.items():
        *groups, last = name.split(".")
        inner = settings
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return build(settings)
