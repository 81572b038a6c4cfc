"""The house's own rules, read off the source: who may import whom, who may touch the environment, what never appears.

Each rule takes one parsed file and yields (line, what is wrong). One test applies every rule to every file; another shows, on a
small offender, that the rule can fail, and on a small innocent, that it does not cry wolf.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("parallel", "models", "research", "experiments", "benchmarks", "tests")
LIBRARY = ("parallel", "models", "research")
MAY_IMPORT = {
    "parallel": {"parallel"},
    "models": {"parallel", "models"},
    "research": {"parallel", "models", "research"},
    "experiments": {"research"},
    "benchmarks": {"parallel", "models", "research"},
}
VARIANT_MAY_IMPORT = {"parallel", "models"}
ENVIRONMENT_IS_TOUCHED_IN = {
    "research/cluster/environment.py",  # reads what a launcher tells a rank, sets the threads
    "parallel/distributed.py",  # LOCAL_RANK, for DeepSpeed
    "research/evaluation/lm_eval_task.py",  # "no network" for lm-evaluation-harness' libraries
    "research/tracking/tracker.py",  # W&B takes its cache folders from there only
}
FORBIDDEN = ("pickle.load", "weights_only=False", "yaml.load", "shell=True", "trust_remote_code=True", "allow_pickle=True")
EXPERIMENT_FILES = {"config.py", "launch.py", "variant.py"}
TORCHLESS = ("models.config", "research.config.schema", "research.launch", "research.data", "research.cli.import_", "research.cli.export")


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


def arrows(source: Source) -> Iterator[Finding]:
    """experiments → research → models → parallel, and never back; nobody imports a benchmark or a test."""
    if source.folder == "tests":
        return
    allowed = MAY_IMPORT[source.folder]
    if source.folder == "experiments" and source.path.endswith("/variant.py"):
        allowed = allowed | VARIANT_MAY_IMPORT
    for line, name in imports(source):
        if (top := name.split(".")[0]) in FOLDERS and top not in allowed:
            yield line, f"imports {name}: {source.folder}/ may import {', '.join(sorted(allowed))}"


def experiments_stand_alone(source: Source) -> Iterator[Finding]:
    """No experiment reads another one, by package, by folder name or by a relative import."""
    if source.folder != "experiments":
        return
    names = {"experiments", *(path.name for path in (ROOT / "experiments").iterdir() if path.is_dir())}
    for line, name in imports(source):
        if name.split(".")[0] in names:
            yield line, f"imports {name}: copy what you need, an ablation is a folder"


def deepspeed_only_in_parallel(source: Source) -> Iterator[Finding]:
    """Whoever else needs DeepSpeed asks parallel/engines/engine.py."""
    if source.folder not in ("parallel", "tests"):
        yield from _imports_of("deepspeed", source, "only parallel/ may")


def wandb_only_in_tracking(source: Source) -> Iterator[Finding]:
    """One file knows W&B, so that a run without it is the same run."""
    if source.folder != "tests" and source.path != "research/tracking/tracker.py":
        yield from _imports_of("wandb", source, "only research/tracking/tracker.py may")


def spmd_types_only_where_types_are_checked(source: Source) -> Iterator[Finding]:
    """What runs and trains knows nothing of the checker, which only requirements-dev.txt installs."""
    if source.folder != "tests" and not source.path.startswith("research/typed_"):
        yield from _imports_of("spmd_types", source, "only research/typed_*.py may")


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
    *(arrows, experiments_stand_alone, deepspeed_only_in_parallel, wandb_only_in_tracking, spmd_types_only_where_types_are_checked),
    *(environment_in_named_places, library_is_silent, public_names_say_what_they_are, nothing_forbidden),
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
OFFENDERS: list[tuple[Rule, str, str]] = [  # the finding must name the line that ends in "here"
    (arrows, "parallel/x.py", DOC + "from models.gpt import layers  # here"),
    (arrows, "parallel/x.py", DOC + "from ..research import config  # here"),
    (arrows, "parallel/x.py", DOC + "def f():\n    import research  # here"),
    (arrows, "models/x.py", DOC + "import parallel.grid, research.config  # here"),
    (arrows, "models/x.py", DOC + "import importlib\nimportlib.import_module('research.training.loop')  # here"),
    (arrows, "research/data/x.py", DOC + "from experiments.gpt_sotu import config  # here"),
    (arrows, "research/x.py", DOC + "import tests.harness  # here"),
    (arrows, "experiments/a/config.py", DOC + "from models.gpt import layers  # here"),
    (arrows, "experiments/a/variant.py", DOC + "from benchmarks import train  # here"),
    (arrows, "benchmarks/x.py", DOC + "import tests.harness  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from experiments.b.config import config  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from ..b.config import config  # here"),
    (experiments_stand_alone, "experiments/a/config.py", DOC + "from gpt_sotu.config import config  # here"),
    (deepspeed_only_in_parallel, "research/x.py", DOC + "def f():\n    from deepspeed.runtime import engine  # here"),
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
    ("parallel/x.py", DOC + "import deepspeed, torch\nfrom parallel.grid import Grid\nfrom .slices import Slice"),
    ("parallel/distributed.py", DOC + "import os\nos.environ['LOCAL_RANK'] = '0'"),
    ("models/x.py", DOC + "from parallel.grid import Grid\ndef _helper():\n    return sys.environment"),
    ("models/y.py", DOC + '@overload\ndef f(x): ...\ndef f(x):\n    """Says."""'),
    ("research/tracking/tracker.py", DOC + "import wandb\nprint('hello')"),
    ("research/typed_x.py", DOC + "from spmd_types import R"),
    ("research/data/x.py", DOC + 'def f():\n    """Loads."""\n    np.load(path, allow_pickle=False)'),
    ("experiments/a/config.py", DOC + "from research.config import Experiment"),
    ("experiments/a/variant.py", DOC + "from models.norm import LayerNorm\nfrom parallel.grid import Grid\nclass A:\n    pass"),
    ("tests/test_x.py", "import wandb, deepspeed, os\nprint(os.environ, 'pickle.load')"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_leaves_the_innocent_alone(rule: Rule) -> None:
    assert broken(rule, [Source(path, text) for path, text in INNOCENTS]) == []


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
