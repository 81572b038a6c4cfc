"""The house's own rules, read off the source: who may import whom, who may touch the environment, what never appears.

Each rule takes one parsed file and yields (line, what is wrong). One test applies every rule to every file; another shows, on a
small offender, that the rule can fail, and on a small innocent, that it does not cry wolf.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("parallel", "models", "research", "experiments", "benchmarks", "tests")
LIBRARY = ("parallel", "models", "research")
MAY_IMPORT: dict[str, set[str]] = {
    "parallel": set(),
    "parallel/engines": {"parallel"},
    "parallel/checkpoint": {"parallel", "parallel/engines"},
    "models": {"parallel"},
    "models/estimates": {"models", "parallel"},
    "models/conversion": {"models", "parallel"},
    "models/inference": {"models", "models/estimates", "parallel"},
    "research/tracking": set(),
    "research/cluster": set(),
    "research/data": set(),
    "research/config": {"research/cluster"},
    "research/generation": {"research/config", "research/data", "research/tracking", "research/cluster"},
    "research/reliability": {"research/cluster", "research/tracking"},
    "research/evaluation": {"research/generation", "research/config", "research/data", "research/tracking", "research/cluster"},
    "research/exchange": {"research/generation", "research/config", "research/data", "research/tracking", "research/cluster"},
    "research/serving": {"research/generation", "research/data", "research/cluster"},
    "research/training": {
        *("research/evaluation", "research/generation", "research/reliability"),
        *("research/config", "research/data", "research/tracking", "research/cluster"),
    },
    "research/ablation": {"research/reliability", "research/config", "research/data", "research/tracking", "research/cluster"},
    "research/verification": {
        *("research/training", "research/reliability", "research/config"),
        *("research/data", "research/tracking", "research/cluster"),
    },
}
"""A room -> the rooms that it may import besides itself. Every room of research/ may also import all of parallel/ and models/."""
FRONT = {"research/cli", "research/serving", "research/exchange", "research/verification", "research/ablation"}
"""Rooms that research/launch.py, and with it every launch, does without."""
ROOMS = {*MAY_IMPORT, "research", "research/cli"}
VARIANT_MAY_IMPORT = {"parallel", "models"}
ENVIRONMENT_IS_TOUCHED_IN = {
    "research/cluster/environment.py",  # reads what a launcher tells a rank, sets the threads
    "parallel/distributed.py",  # LOCAL_RANK, for DeepSpeed
    "research/evaluation/lm_eval_task.py",  # "no network" for lm-evaluation-harness' libraries
    "research/tracking/wandb_client.py",  # W&B takes its cache folders from there only
}
SHOWS_TEXT_IN = {
    "research/tracking/console.py",  # makes all of its text printable
    "research/tracking/streams.py",
    "research/cluster/exit_codes.py",  # `sentence` is printable
    "research/cli/json_output.py",  # JSON escapes it
    "research/cli/generate.py",  # printable in a terminal, exact elsewhere
    "research/cli/serve.py",
    "research/cli/runs.py",
    "research/cli/evaluate.py",
    "research/cli/trained_run.py",
    "research/__main__.py",  # its own help
    "research/cli/verify.py",  # this and what follows, like research/verification/, tell of this checkout's own experiments
    "research/launch.py",
    "research/training/loop.py",
    "research/training/resume.py",
    "research/reliability/supervisor.py",
    "research/reliability/hosts.py",  # names of the user's own hostfile
    "research/cluster/rendezvous.py",  # `sentence` is printable
    "research/cli/cluster.py",  # a script, exact, of the user's own words
    "research/cli/sweep.py",  # likewise
}
"""Files that write to standard output or error. Any other uses research.tracking.console.Console, which makes text printable."""
FORBIDDEN = ("pickle.load", "weights_only=False", "yaml.load", "shell=True", "trust_remote_code=True", "allow_pickle=True")
EXPERIMENT_FILES = {"config.py", "launch.py", "variant.py", "results"}
TORCHLESS = (
    *("models.config", "research.config.schema", "research.launch", "research.data"),
    *(
        "research.cli.import_",
        "research.cli.export",
        "research.cli.data",
        "research.cli.fork",
        "research.cli.check",
        "research.cli.diff",
        "research.cli.tree",
    ),
)


class Source(NamedTuple):
    """One file: its path from the root, with slashes, and what it says."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parts[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)


Finding = tuple[int, str]
Rule = Callable[[Source], Iterator[Finding]]


def sources(root: Path = ROOT) -> list[Source]:
    """Every Python file of the house, tracked or not yet."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return [Source(path.relative_to(root).as_posix(), path.read_text("utf-8")) for path in paths]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of whatever the file imports, wherever in it; `from a import b` counts as a.b."""
    package = PurePosixPath(source.path).parent.parts
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("importlib.import_module", "import_module", "__import__"):
            yield from ((node.lineno, argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def room_of(path: str) -> str:
    """The room that a file of the library stands in: 'research/training' for research/training/loop.py, 'research' for launch.py."""
    parts = PurePosixPath(path).parent.parts[:2]
    return "/".join(parts) if "/".join(parts) in ROOMS else parts[0]


def module_file(name: str, files: Container[str]) -> str | None:
    """The file among `files` that the dotted name `name` begins with: 'models.gpt.layers' -> models/gpt.py; None for a library's."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[:end])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
            if candidate in files:
                return candidate
    return None


def arrows(source: Source) -> Iterator[Finding]:
    """experiments → research → models → parallel, and between rooms as MAY_IMPORT says; nobody imports a benchmark or a test."""
    if source.folder == "tests":
        return
    for line, name in imports(source):
        parts = name.split(".")
        if parts[0] not in FOLDERS:
            continue
        target = "/".join(parts[:2]) if "/".join(parts[:2]) in ROOMS else parts[0]
        if parts[:2] == ["research", "api"]:
            yield line, f"imports {name}: research/api.py is for users' own programs, and nothing here may import it"
            continue
        if name == "research.ROOT" or (source.folder in LIBRARY and target == room_of(source.path)):
            continue
        if not may_import(source, target):
            yield line, f"imports {name}: {room_of(source.path) if source.folder in LIBRARY else source.folder}/ may not import {target}/"


def may_import(source: Source, target: str) -> bool:
    """Whether the file may import the room (or folder) `target`, which is not its own."""
    top = target.partition("/")[0]
    if source.folder == "experiments":
        return top == "research" or (source.path.endswith("/variant.py") and top in VARIANT_MAY_IMPORT)
    if source.folder == "benchmarks":
        return top in LIBRARY
    room = room_of(source.path)
    if source.folder == "research" and top in ("parallel", "models"):
        return True
    if room == "research/cli":
        return top == "research"
    if source.path == "research/launch.py":
        return top == "research" and target not in FRONT
    if source.path == "research/api.py":
        return top == "research" and target != "research/cli"
    if source.path == "research/__main__.py":
        return target in ("research/cli", "research/cluster", "research/tracking")
    return target in MAY_IMPORT.get(room, set())


def cycles(files: list[Source]) -> list[list[str]]:
    """Circles of files that import one another, wherever in them, `if TYPE_CHECKING:` included. A package's file counts for itself."""
    paths = {source.path for source in files if source.folder in LIBRARY}
    graph = {
        source.path: sorted({target for _, name in imports(source) if (target := module_file(name, paths)) and target != source.path})
        for source in files
        if source.folder in LIBRARY
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            found.append([*trail[trail.index(path) :], path])
            return
        if path in done:
            return
        for target in graph[path]:
            visit(target, [*trail, path])
        done.add(path)

    for path in graph:
        visit(path, [])
    return found


def experiments_stand_alone(source: Source) -> Iterator[Finding]:
    """No experiment reads another one, by package, by folder name or by a relative import."""
    if source.folder != "experiments":
        return
    names = {"experiments", *(path.name for path in (ROOT / "experiments").iterdir() if path.is_dir())}
    for line, name in imports(source):
        if name.split(".")[0] in names:
            yield line, f"imports {name}: copy what you need, an ablation is a folder"


def deepspeed_only_with_the_engines(source: Source) -> Iterator[Finding]:
    """Whoever else needs DeepSpeed asks parallel/engines/engine.py. The ledger and a mutation of the tests look into it."""
    if source.folder != "tests" and source.path != "parallel/distributed.py" and not source.path.startswith("parallel/engines/"):
        yield from _imports_of("deepspeed", source, "only parallel/distributed.py and parallel/engines/ may")


def wandb_only_in_tracking(source: Source) -> Iterator[Finding]:
    """Two files know W&B, so that a run without it is the same run."""
    if source.folder != "tests" and not source.path.startswith("research/tracking/wandb_"):
        yield from _imports_of("wandb", source, "only research/tracking/wandb_*.py may")


def spmd_types_only_where_types_are_checked(source: Source) -> Iterator[Finding]:
    """What runs and trains knows nothing of the checker, which only requirements-dev.txt installs."""
    if source.folder != "tests" and not source.path.startswith("research/verification/spmd_"):
        yield from _imports_of("spmd_types", source, "only research/verification/spmd_*.py may")


def _imports_of(package: str, source: Source, who: str) -> Iterator[Finding]:
    for line, name in imports(source):
        if name.split(".")[0] == package:
            yield line, f"imports {name}: {who}"


def environment_in_named_places(source: Source) -> Iterator[Finding]:
    """A setting that hides in a variable is not in the run's record."""
    if source.folder == "tests" or source.path in ENVIRONMENT_IS_TOUCHED_IN:
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    where = ", ".join(sorted(ENVIRONMENT_IS_TOUCHED_IN))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name):
            yield node.lineno, f"touches {ast.unparse(node)}: only {where} may"
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            yield node.lineno, f"imports the environment from os: only {where} may"


def library_is_silent(source: Source) -> Iterator[Finding]:
    """parallel/, models/ and research/data/ return and raise; rank 0 reports, elsewhere."""
    if not source.path.startswith(("parallel/", "models/", "research/data/")):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _called(node) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield node.lineno, f"calls {_called(node)}: return it, raise it, or let rank 0 report it"


def text_leaves_by_named_exits(source: Source) -> Iterator[Finding]:
    """What a terminal is shown may be a stranger's text: a new verb shows it with Console, which makes it printable."""
    if source.folder != "research" or source.path in SHOWS_TEXT_IN or source.path.startswith("research/verification/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _called(node) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield node.lineno, f"calls {_called(node)}: use research.tracking.console.Console, which makes text printable"
    for line, name in imports(source):
        if name.startswith("rich.console"):
            yield line, f"imports {name}: use research.tracking.console, which makes text printable"


def public_names_say_what_they_are(source: Source) -> Iterator[Finding]:
    """Every library module, public class and public function has a docstring (an @overload is not a function of its own)."""
    if source.folder not in LIBRARY:
        return
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"
    for node in source.tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_") or "overload" in map(ast.unparse, node.decorator_list):
            continue
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def nothing_forbidden(source: Source) -> Iterator[Finding]:
    """Nothing that would run code out of a file, or a command out of a string, appears outside the tests, not even in a comment."""
    if source.folder == "tests":
        return
    for number, line in enumerate(source.text.splitlines(), start=1):
        squeezed = line.replace(" ", "")
        yield from ((number, f"contains {word}") for word in FORBIDDEN if word in squeezed)
    for line, name in imports(source):
        if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal"):
            yield line, f"imports {name}: files are safetensors and JSON"


RULES: list[Rule] = [
    *(arrows, experiments_stand_alone, deepspeed_only_with_the_engines, wandb_only_in_tracking, spmd_types_only_where_types_are_checked),
    *(environment_in_named_places, library_is_silent, text_leaves_by_named_exits, public_names_say_what_they_are, nothing_forbidden),
]


def broken(rule: Rule, files: list[Source]) -> list[str]:
    """Where the rule is broken: 'path:line: what is wrong'."""
    return [f"{source.path}:{line}: {what}" for source in files for line, what in rule(source)]


@pytest.fixture(scope="module")
def house() -> list[Source]:
    files = sources()
    assert {source.folder for source in files} >= {*LIBRARY, "experiments", "tests"}, "a folder of the house was not found"
    return files


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule, house: list[Source]) -> None:
    offences = broken(rule, house)
    assert not offences, f"{rule.__doc__}\n" + "\n".join(offences)


DOC = '"""A module."""\n'
FORBIDDEN_ARROWS = [  # one for each row of MAY_IMPORT, and for the files that have a rule of their own
    ("parallel/x.py", "parallel.engines.engine"),
    ("parallel/engines/x.py", "parallel.checkpoint.load"),
    ("parallel/checkpoint/x.py", "models.gpt"),
    ("models/x.py", "models.inference.cache"),
    ("models/estimates/x.py", "models.conversion.families"),
    ("models/conversion/x.py", "models.estimates.parameters"),
    ("models/inference/x.py", "research.generation.settings"),
    ("research/tracking/x.py", "research.config.Experiment"),
    ("research/cluster/x.py", "research.tracking.format"),
    ("research/data/x.py", "research.config.Data"),
    ("research/config/x.py", "research.data.prepare"),
    ("research/ablation/x.py", "research.training.resume"),
    ("research/generation/x.py", "research.evaluation.task"),
    ("research/reliability/x.py", "research.training.job"),
    ("research/evaluation/x.py", "research.training.loop"),
    ("research/exchange/x.py", "research.evaluation.task"),
    ("research/serving/x.py", "research.cli.serve"),
    ("research/training/x.py", "research.verification.training"),
    ("research/verification/x.py", "research.evaluation.task"),
    ("research/launch.py", "research.verification.small_run"),
    ("research/__main__.py", "research.training.loop"),
    ("research/api.py", "research.cli.generate"),
    ("research/cli/x.py", "research.api"),
    ("research/cli/x.py", "tests.harness"),
]
OFFENDERS: list[tuple[Rule, str, str]] = [  # the finding must name the line that ends in "here"
    *((arrows, path, DOC + f"import {module}  # here") for path, module in FORBIDDEN_ARROWS),
    (arrows, "parallel/x.py", DOC + "from models.gpt import layers  # here"),
    (arrows, "parallel/x.py", DOC + "from ..research import config  # here"),
    (arrows, "parallel/x.py", DOC + "def f():\n    import research  # here"),
    (arrows, "models/x.py", DOC + "import parallel.grid, research.config  # here"),
    (arrows, "models/x.py", DOC + "import importlib\nimportlib.import_module('research.training.loop')  # here"),
    (arrows, "research/data/x.py", DOC + "from experiments.gpt_sotu import config  # here"),
    (arrows, "research/tracking/x.py", DOC + "if TYPE_CHECKING:\n    from research.training.job import Job  # here"),
    (arrows, "experiments/a/config.py", DOC + "from models.gpt import layers  # here"),
    (arrows, "experiments/a/variant.py", DOC + "from benchmarks import train  # here"),
    (arrows, "benchmarks/x.py", DOC + "from research import api  # here"),
    (arrows, "benchmarks/x.py", DOC + "import tests.harness  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from experiments.b.config import config  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from ..b.config import config  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from gpt_sotu.config import config  # here"),
    (deepspeed_only_with_the_engines, "research/x.py", DOC + "def f():\n    from deepspeed.runtime import engine  # here"),
    (deepspeed_only_with_the_engines, "parallel/checkpoint/x.py", DOC + "import deepspeed  # here"),
    (wandb_only_in_tracking, "research/x.py", DOC + "import wandb  # here"),
    (wandb_only_in_tracking, "parallel/x.py", DOC + "import wandb.sdk as w  # here"),
    (spmd_types_only_where_types_are_checked, "parallel/x.py", DOC + "from spmd_types import R  # here"),
    (spmd_types_only_where_types_are_checked, "research/cli/verify.py", DOC + "import spmd_types.checker  # here"),
    (environment_in_named_places, "research/x.py", DOC + "import os\nos.environ['A']  # here"),
    (environment_in_named_places, "research/x.py", DOC + "import os as o\no.getenv('A')  # here"),
    (environment_in_named_places, "models/x.py", DOC + "from os import environ  # here"),
    (library_is_silent, "parallel/x.py", DOC + "print('hello')  # here"),
    (library_is_silent, "models/x.py", DOC + "def f():\n    print()  # here"),
    (library_is_silent, "research/data/x.py", DOC + "import sys\nsys.stdout.write('hello')  # here"),
    (text_leaves_by_named_exits, "research/cli/x.py", DOC + "def f():\n    print(1)  # here"),
    (text_leaves_by_named_exits, "research/x.py", DOC + "import sys\nsys.stderr.write('hello')  # here"),
    (text_leaves_by_named_exits, "research/cli/x.py", DOC + "from rich.console import Console  # here"),
    (public_names_say_what_they_are, "models/x.py", "import torch  # here"),
    (public_names_say_what_they_are, "research/x.py", DOC + "def f():  # here\n    return 1"),
    (public_names_say_what_they_are, "parallel/x.py", DOC + "class A:  # here\n    ''"),
    *((nothing_forbidden, "research/x.py", DOC + f"f({word})  # here") for word in FORBIDDEN),
    (nothing_forbidden, "research/x.py", DOC + "np.load(path, allow_pickle = True)  # here"),
    (nothing_forbidden, "parallel/x.py", DOC + "from pickle import loads  # here"),
]


def test_every_rule_has_an_offender() -> None:
    assert {rule for rule, _, _ in OFFENDERS} == set(RULES)


@pytest.mark.parametrize(("rule", "path", "text"), OFFENDERS)
def test_a_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    (line,) = (number for number, content in enumerate(text.splitlines(), start=1) if content.endswith("# here"))
    offences = broken(rule, [Source(path, text)])
    assert len(offences) == 1 and offences[0].startswith(f"{path}:{line}: "), offences


INNOCENTS = [
    ("parallel/engines/x.py", DOC + "import deepspeed, torch\nfrom parallel.grid import Grid\nfrom .fp16 import correct"),
    ("parallel/distributed.py", DOC + "import os\nos.environ['LOCAL_RANK'] = '0'"),
    ("models/x.py", DOC + "from parallel.grid import Grid\ndef _helper():\n    return sys.environment"),
    ("models/y.py", DOC + '@overload\ndef f(x): ...\ndef f(x):\n    """Says."""'),
    ("research/tracking/wandb_x.py", DOC + "import wandb"),
    ("research/cli/runs.py", DOC + "print('hello')"),
    ("research/verification/spmd_x.py", DOC + "from spmd_types import R"),
    ("research/data/x.py", DOC + 'def f():\n    """Loads."""\n    np.load(path, allow_pickle=False)'),
    ("experiments/a/config.py", DOC + "from research.config import Experiment"),
    ("experiments/a/variant.py", DOC + "from models.norm import LayerNorm\nfrom parallel.grid import Grid\nclass A:\n    pass"),
    ("tests/test_x.py", "import wandb, deepspeed, os\nprint(os.environ, 'pickle.load')"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_leaves_the_innocent_alone(rule: Rule) -> None:
    assert broken(rule, [Source(path, text) for path, text in INNOCENTS]) == []


def test_every_room_has_a_row_and_a_forbidden_arrow(house: list[Source]) -> None:
    rooms = {room_of(source.path) for source in house if source.folder in LIBRARY}
    assert rooms == ROOMS
    assert {room_of(path) for path, _ in FORBIDDEN_ARROWS} == ROOMS


def test_no_file_imports_itself_through_others(house: list[Source]) -> None:
    assert cycles(house) == []


def test_the_rule_on_circles_can_fail() -> None:
    a = Source("models/a.py", "if TYPE_CHECKING:\n    from models.b import B")
    b = Source("models/b.py", "def f():\n    from models import c")
    c = Source("models/c.py", "import models.a")
    assert cycles([a, b, c]) == [["models/a.py", "models/b.py", "models/c.py", "models/a.py"]]
    assert cycles([a, b]) == []


def without_torch(module: str, root: Path) -> subprocess.CompletedProcess:
    """Imports the module in a fresh process of its own; exits 1, naming torch, where that brought torch in."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module}; sys.exit('torch' in sys.modules and 'torch was imported')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", TORCHLESS)
def test_a_mistake_is_refused_before_torch(module: str) -> None:
    finished = without_torch(module, ROOT)
    assert finished.returncode == 0, f"import {module}: {finished.stderr}"


def test_the_torch_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "inner.py").write_text("import torch")
    (tmp_path / "config.py").write_text("import inner")
    finished = without_torch("config", tmp_path)
    assert finished.returncode == 1 and "torch was imported" in finished.stderr


def untidy_experiments(folder: Path) -> list[str]:
    """What is wrong with the experiment folders: a missing or extra file, or a launch.py that is not the others' to the byte."""
    experiments = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__")
    launchers = {path.name: (path / "launch.py").read_bytes() for path in experiments if (path / "launch.py").is_file()}
    found = [f"{folder.name}/: no experiment has a launch.py"] if not launchers else []
    for path in experiments:
        here = {file.name for file in path.iterdir()} - {"__pycache__"}
        found += [f"{folder.name}/{path.name}/{name}: missing" for name in sorted({"config.py", "launch.py"} - here)]
        found += [f"{folder.name}/{path.name}/{name}: not {sorted(EXPERIMENT_FILES)}" for name in sorted(here - EXPERIMENT_FILES)]
        if path.name in launchers and launchers[path.name] != (first := next(iter(launchers.items())))[1]:
            found.append(f"{folder.name}/{path.name}/launch.py:1: differs from {first[0]}/launch.py")
    return found


def test_an_experiment_is_a_config_and_the_one_launcher() -> None:
    assert untidy_experiments(ROOT / "experiments") == []


def test_the_experiment_rule_can_fail(tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    for name, launcher in (("a", "run()"), ("b", "run() "), ("c", "run()")):
        (folder / name).mkdir(parents=True)
        (folder / name / "launch.py").write_text(launcher)
        (folder / name / "config.py").write_text("")
    assert untidy_experiments(folder) == ["experiments/b/launch.py:1: differs from a/launch.py"]
    (folder / "c" / "config.py").rename(folder / "c" / "notes.txt")
    assert [line.split(": ")[0] for line in untidy_experiments(folder)[1:]] == ["experiments/c/config.py", "experiments/c/notes.txt"]
    assert untidy_experiments(tmp_path / "experiments" / "a") == ["a/: no experiment has a launch.py"]
