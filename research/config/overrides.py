"""Command line of launch.py: overrides of an experiment's settings, the options beside them, and --help.

tyro reads the types and draws --help. Every error is a Mistake: one sentence, not tyro's box.
"""

import contextlib
import io
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo

from parallel.errors import Mistake, listed, nearest
from research.config.examples import describe_examples
from research.config.schema import MODELS, Data, Experiment
from research.config.serialization import build
from research.config.settings import LONGEST, groups_of, is_group, names, needs, unknown
from research.config.sources import describe_texts

Override = tuple[str, Any, Any]
"""(dotted name, value in config.py, value on the command line)."""

HELP, VERSION = ("--help", "-h"), "--version"
FLAGS = ("rehash", "dry_run", "check_cluster", "verbose")
OPTIONS = ("--resume", "--rehash", "--dry-run", "--check-cluster", "--verbose", "--version", "--help")
RESUME = "resume"
LOCAL_RANK = "local_rank"
TABLE = "deepspeed"
USAGE = """start it, from any folder:
  {ranks} ranks here:{space}deepspeed --num_gpus {ranks} {path}{cut}
  a cluster:       deepspeed --hostfile hosts {path}
  Slurm:           srun --ntasks-per-node {ranks} python {path}{cut}
  or else:         torchrun --nproc_per_node {ranks} {path}{cut}
  one rank:        python {path}{uncut}

beside settings:
  --resume    auto: go on with the newest unfinished run that has these settings, or begin one · RUN or CHECKPOINT: go on with that
              one · never (the default): begin a new run. The layout may be another one, the model and the data may not
  --rehash    read the texts and the token stores whole, whatever data.cache remembers of them; otherwise a file is read again only if
              its size or its modification time has changed
  --dry-run   resolve everything, print the layout and the batch arithmetic, train nothing
  --check-cluster  compare the hosts of this launch (code, versions, settings, addresses, folders, clocks), time an all-reduce along
              each axis, train nothing: a table, and exit code 0 if they agree
  --verbose   show what DeepSpeed and W&B have to say
  --version   show which code and libraries these are
  --help      this text; --help GROUP: the settings of one group, such as --help optimizer

Any setting below may follow as --group.name value, with dashes or underscores, and is recorded with the run.
"default" is its value in this experiment's config.py. The deepspeed table can be changed there only.
Ranks = pipe × data × tensor: the data-parallel size is what pipe and tensor leave."""


@dataclass(frozen=True)
class Options:
    """The options of the command line that are not settings."""

    resume: str = "never"
    """"auto", "never", or the name of a run or a checkpoint."""
    rehash: bool = False
    """Whether texts and token stores are read whole, whatever data.cache remembers of them."""
    dry_run: bool = False
    check_cluster: bool = False
    verbose: bool = False
    version: bool = False
    help: bool = False
    help_group: str = ""
    """The one group of settings that --help shows; empty: all of them."""

    @property
    def trains_nothing(self) -> bool:
        """Whether a launch with these options only shows or checks something."""
        return self.help or self.version or self.dry_run or self.check_cluster


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Experiment, list[Override], Options]:
    """The experiment with the command line's settings, the overrides that changed a value, and the options.

    Settings are validated together, so `--model.num_heads 8 --model.num_kv_heads 8` is checked as a whole. The last one counts
    where a setting is given twice. `--local_rank`, which deepspeed's launcher puts first, is accepted and ignored: the rank comes
    from the environment.
    """
    for i, word in enumerate(argv):
        if word in HELP:
            group = next((after for after in argv[i + 1 : i + 2] if not after.startswith("--")), "")
            return experiment, [], Options(help=True, help_group=group)
        if word == VERSION:
            return experiment, [], Options(version=True)
    options, values = Options(), {}
    for name, words in _grouped(argv):
        if name in FLAGS:
            if words:
                raise Mistake(f"--{name.replace('_', '-')} takes no value, got {' '.join(words)!r} → write it alone")
            options = replace(options, **{name: True})  # type: ignore[arg-type]
        elif name == RESUME:
            if len(words) != 1:
                forms = f"--{name} auto, --{name} never, or --{name} runs/NAME/ID"
                raise Mistake(f"--{name} takes one word, got {len(words)} → write {forms}")
            options = replace(options, resume=words[0])
        elif name != LOCAL_RANK:
            values[name] = _read(_field(experiment, name, OPTIONS), name, words, _get(experiment, name))
    changed = replaced(experiment, values) if values else experiment
    overrides = [(name, _get(experiment, name), _get(changed, name)) for name in values]
    return changed, [override for override in overrides if override[1] != override[2]], options


def read_settings(experiment: Experiment, assignments: Sequence[str]) -> dict[str, Any]:
    """The values that texts such as 'model.norm=rmsnorm' give to settings, by dotted name, read as the command line reads them.

    A setting of several texts, such as track.tags, may be given several times, once for each text. Several numbers are written with
    commas, as in optimizer.betas=0.9,0.98.
    """
    words: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise Mistake(f"{assignment[:LONGEST]!r} gives no setting a value → write NAME=VALUE, such as model.norm=rmsnorm")
        words.setdefault(name.strip().removeprefix("--").replace("-", "_"), []).append(value)
    values = {}
    for name, given in words.items():
        field = _field(experiment, name)
        is_several = any(get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation)))
        if len(given) > 1 and not is_several:
            raise Mistake(f"{name} is given {len(given)} values, {listed(given, 'and')[:LONGEST]} → give it one")
        if is_several and get_origin(field.annotation) is not tuple and not _is_text(field.annotation):  # or None, as schedule.batch_ramp
            given = " ".join(given).strip("()[]").replace(",", " ").split()
        values[name] = _read(field, name, given, _get(experiment, name))
    return values


def show_help(experiment: Experiment, path: str, group: str = "") -> None:
    """Print the experiment's question, how to start it, and every setting with its value and meaning; or the settings of one `group`."""
    description = f"{experiment.question}\n\n{usage(experiment, path)}"
    data = _texts_as_words(experiment.data)
    fields: dict[str, Any] = {  # of the classes that are there: tyro makes a command of each class that a setting may be
        name: (type(value), Experiment.model_fields[name]) for name, value in (("data", data), ("model", experiment.model))
    }
    whole = create_model(Experiment.__name__, __base__=Experiment, **fields)
    shown: BaseModel = whole(**{**dict(experiment), "data": data, TABLE: {}})  # tyro does not list an empty table
    if group:
        name, groups = group.partition(".")[0], [name for name, field in Experiment.model_fields.items() if is_group(field)]
        if name not in groups:
            near = (nearest(group, [*groups, *names(Experiment)]) or "").partition(".")[0]  # of a setting, its group
            raise Mistake(f"--help {group} is not a group of settings → use {listed([near] if near in groups else groups)}")
        one_group: dict[str, Any] = {name: (type(getattr(shown, name)), ...)}
        shown = create_model(Experiment.__name__, **one_group)(**{name: getattr(shown, name)})
        description = f"{Experiment.model_fields[name].description} (--help alone shows all settings)"
    config = (tyro.conf.FlagConversionOff,)  # True and False are written out, on the command line as in the file
    with contextlib.suppress(SystemExit):
        tyro.cli(type(shown), prog=path, description=description, default=shown, args=["--help"], config=config, use_underscores=True)


def _texts_as_words(data: Data) -> Data:
    """The settings of the texts as tyro can show them: it makes commands of a setting of several types."""
    words = {"train": describe_texts(data.train), "examples": describe_examples(data.examples)}
    fields: dict[str, Any] = {name: (str, FieldInfo(annotation=str, description=Data.model_fields[name].description)) for name in words}
    shown = create_model(Data.__name__, __base__=Data, __doc__=Data.__doc__, **fields)
    return shown.model_construct(**{**dict(data), **words})  # words are not validated: they are for readers


def usage(experiment: Experiment, path: str) -> str:
    """How to start this experiment: on the ranks of its own layout where that has several, else on two as an example."""
    pipe, tensor = experiment.parallel.pipe, experiment.parallel.tensor
    uncut = [f" --parallel.{axis} 1" for axis, size in (("pipe", pipe), ("tensor", tensor)) if size > 1]
    ranks = pipe * tensor if uncut else 2
    example = "" if uncut else " --parallel.tensor 2"
    return USAGE.format(path=path, ranks=ranks, space=" " * (5 - len(str(ranks))), cut=example, uncut="".join(uncut))


def _grouped(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """['--a-b', '1', '2', '--c=3'] -> [('a_b', ['1', '2']), ('c', ['3'])]. Nothing may follow a value that was given with `=`."""
    groups: list[tuple[str, list[str]]] = []
    closed = True
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
            closed = bool(equals)
        elif closed:
            raise Mistake(f"{word!r} belongs to no setting → write --group.name value, for example --parallel.tensor 2")
        else:
            groups[-1][1].append(word)
            closed = groups[-1][0] == LOCAL_RANK
    return groups


def _field(experiment: Experiment, name: str, options: Sequence[str] = ()) -> FieldInfo:
    """The schema's field of a dotted name, for a model of this experiment's kind; `options`: what else may be meant."""
    if name.partition(".")[0].partition("_")[0] == TABLE:
        raise Mistake(f"--{name}: {TABLE} is a table and lives in the file only → write {TABLE}={{…}} in config.py")
    group: type[BaseModel] | None = type(experiment)
    field: FieldInfo | None = None
    for i, part in enumerate(name.split(".")):
        if group is None or (field := group.model_fields.get(part)) is None:
            raise _not_there(experiment, name, options)
        group = (type(getattr(experiment, part)) if i == 0 else groups_of(field)[0]) if is_group(field) else None
    if group is not None:
        example = min(group.model_fields, key=lambda setting: not group.model_fields[setting].is_required())
        raise Mistake(f"{name} is a group of settings → name one of them, for example --{name}.{example}")
    assert field is not None
    return field


def _not_there(experiment: Experiment, name: str, options: Sequence[str]) -> Mistake:
    """A Mistake for a name that is no setting, or one of another kind of model."""
    section, _, setting = name.partition(".")
    owners = [kind.__name__ for kind in MODELS.values() if setting in kind.model_fields] if section == "model" else []
    if owners:
        own = type(experiment.model).__name__
        return Mistake(
            f"{name} is a setting of {listed(owners, 'and')}, and the model is a {own} → leave it out, or change the model in config.py"
        )
    return unknown(name, [*names(Experiment), *options])


def _read(field: FieldInfo, name: str, words: list[str], current: Any) -> Any:
    """The words after a setting as a value of the field's type. Text is taken as it is, tyro reads everything else."""
    annotation: Any = field.annotation
    parts = get_args(annotation) if get_origin(annotation) is tuple else ()
    if not words and annotation is bool:
        return True

    # any number of texts: each word is one of them, whatever it contains
    if parts and parts[-1] is ... and _is_text(parts[0]):
        return tuple(words)

    if not words:
        now = " ".join(map(str, current)) if isinstance(current, tuple) else current
        raise Mistake(f"--{name} has no value → give it {needs(field)}, now: {now}")
    if _is_text(annotation):
        if len(words) > 1 and any(get_origin(part) is tuple for part in get_args(annotation)):
            return tuple(words)
        if len(words) > 1:
            raise Mistake(f'--{name} takes one value, got {len(words)} → put quotes around it: --{name} "{" ".join(words)}"')
        return None if words == ["None"] and annotation is not str else words[0]

    # '0.9,0.95' and '(0.9, 0.95)' are two words of a tuple; true and false may be written in lower case
    arguments = words
    if parts:
        arguments = " ".join(words).strip("()[]").replace(",", " ").split()
    elif annotation is bool:
        arguments = [word.capitalize() for word in words]
    discarded = io.StringIO()
    with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        try:
            return tyro.cli(annotation, args=arguments, console_outputs=False)
        except SystemExit:
            pass
    raise Mistake(f"{name} = {' '.join(words)!r} does not work → use {needs(field)}")


def _is_text(annotation: Any) -> bool:
    """Whether the annotation is `str` or a union with `str`."""
    optional = get_origin(annotation) in (Union, types.UnionType)
    parts = get_args(annotation) if optional else (annotation,)
    return str in [part.__origin__ if get_origin(part) is Annotated else part for part in parts]


def _get(experiment: Experiment, name: str) -> Any:
    value: Any = experiment
    for part in name.split("."):
        value = getattr(value, part)
    return value


def replaced(experiment: Experiment, values: dict[str, Any]) -> Experiment:
    """The experiment with these dotted settings replaced, validated as a whole."""
    settings = experiment.model_dump()
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = settings
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return build(settings)
