"""Settings are edited in place, whatever form config.py gives them, or refused with the line that decides them.

The independent truth is Python: the edited file is executed, and must give the settings that building them directly gives.
"""

import difflib
from pathlib import Path

import pytest

from research import ROOT
from research.ablation.source_edit import with_settings
from research.ablation.source_text import decoded, encoded, literal
from research.config import Experiment
from research.config.experiment_folder import source_of
from research.config.overrides import replaced
from tests.research.helpers.example import sentence

GOOD = (ROOT / "experiments/gpt_sotu/config.py").read_text("utf-8")
HEAD, BODY = GOOD.split("config = ")
MODEL = BODY[BODY.index("GPT(") : BODY.index("    data=")].rstrip().rstrip(",")
OPTIMIZER = BODY[BODY.index("Optimizer(") : BODY.index("    parallel=")].rstrip().rstrip(",")


def run(text: str) -> Experiment:
    names: dict = {}
    exec(compile(text, "config.py", "exec"), names)
    return names["config"]


def edited(text: str, **values) -> str:
    """The text after the edits, which must give what the settings built directly give. Dots are written as two underscores."""
    wanted = {name.replace("__", "."): value for name, value in values.items()}
    result, _ = with_settings(text, wanted, "mine/config.py")
    assert run(result) == replaced(run(text), wanted)
    return result


def changed_lines(old: str, new: str) -> list[str]:
    return [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]


FORMS = {
    "values in variables": GOOD.replace("config =", 'NORM = "layernorm"\nBASE = 3e-3\nconfig =')
    .replace('norm="layernorm"', "norm=NORM").replace("lr=3e-3", "lr=BASE * 1.0"),
    "groups in variables": f"{HEAD}network = {MODEL}\noptimizer = {OPTIMIZER}\nconfig = {BODY}"
    .replace(f"model={MODEL}", "model=network").replace(f"optimizer={OPTIMIZER}", "optimizer=optimizer"),
    "other names of the classes": GOOD.replace("import GPT, Data, Exp", "import GPT as Network, Data, Exp").replace("=GPT(", "=Network("),
    "a module": "import research.config as rc\nfrom research.config import *\n\nconfig = " + BODY.replace("Exp", "rc.Exp", 1),
    "a dictionary of settings": GOOD.replace("config =", 'COMMON = {"norm": "layernorm", "norm_eps": 1e-5}\nconfig =')
    .replace('norm="layernorm",', "**COMMON,").replace("        norm_eps=1e-5,\n", ""),
    "dict(…)": GOOD.replace('norm="layernorm",', "**COMMON,").replace("        norm_eps=1e-5,\n", "")
    .replace("config =", 'COMMON = dict(norm="layernorm", norm_eps=1e-5)\nconfig ='),
    "a dictionary over another": GOOD.replace("config =", 'COMMON = {"norm": "rmsnorm", "norm_eps": 1e-5}\nconfig =')
    .replace('norm="layernorm",', '**COMMON | {"norm": "layernorm"},').replace("        norm_eps=1e-5,\n", ""),
    "a copy of another in the file": GOOD.replace("config =", "base =") + 'config = base.model_copy(update={"seed": 2})\n',
    "a copy of a group": GOOD.replace("config =", "base =")
    + 'config = base.model_copy(update={"model": base.model.model_copy(update={"norm": "layernorm"}), "seed": 2})\n',
    "later assignments": GOOD + 'config.seed = 7\nconfig.model.norm = "layernorm"\nconfig.optimizer.lr = 1e-3\n',
    "an annotation": GOOD.replace("config =", "config: Experiment ="),
    "one line": HEAD + "config = " + " ".join(line.strip() for line in BODY.splitlines()) + "\n",
    "no comma at the end": GOOD.replace("tied=True,\n", "tied=True  # the head is the embedding\n").replace("seed=1,\n", "seed=1\n"),
    "comments everywhere": "".join(f"{line}  # note\n" if line.endswith((",", "(")) else f"{line}\n" for line in GOOD.splitlines()),
    "parentheses around values": GOOD.replace('norm="layernorm"', 'norm=("layernorm")').replace("seed=1,", "seed=(1)"),
    "letters beyond ASCII": GOOD.replace('"fp32",', '"fp32", track=Track(project="Ünïcode—½"), seed=1,', 1)
    .replace('    track=Track(project="tessera"),\n    seed=1,\n', ""),
    "as import writes it": source_of(run(GOOD)),
    "tabs": GOOD.replace("    ", "\t"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_edited(form: str) -> None:
    text = FORMS[form]
    assert text != GOOD
    result = edited(text, model__norm="rmsnorm", optimizer__lr=0.002, seed=3)
    assert len(changed_lines(text, result)) <= 8 or form == "one line"
    if form == "comments everywhere":
        assert all(line.endswith("  # note") for line in changed_lines(text, result) if not line.endswith(")"))
    assert "rmsnorm" in result and result.count("# note") == text.count("# note")


ADDED_TO = (
    "as import writes it",
    "comments everywhere",
    "one line",
    "no comma at the end",
    "tabs",
    "groups in variables",
    "a module",
    "other names of the classes",
)


@pytest.mark.parametrize("form", [*ADDED_TO, "as shipped", "a copy of another in the file"])
def test_what_is_not_written_is_added(form: str) -> None:
    text = {"as shipped": GOOD, **FORMS}[form]
    values = {"changes": ("a", "b"), "schedule__log_every": 5, "watch__spike": 5.0, "watch__hang_seconds": 9.5, "model__head_size": 64}
    result = edited(text, **values)
    assert result.count("# note") == text.count("# note")
    unchanged = [line for line in text.splitlines() if not any(word in line for word in ("import", "Schedule(", "update="))]
    kept = [line if "# note" in line else line.split("#")[0].strip().rstrip(",") for line in unchanged]
    assert form == "one line" or all(line in result for line in kept)


def test_an_addition_has_the_place_of_the_schema_and_the_style_of_its_neighbours() -> None:
    result = edited(GOOD, changes=("model.norm",), watch__spike=5.0, schedule__log_every=5)
    assert changed_lines(GOOD, result) == [
        "- from research.config import GPT, Data, Experiment, Optimizer, Parallel, Sample, Schedule, Track",
        "+ from research.config import GPT, Data, Experiment, Optimizer, Parallel, Sample, Schedule, Track, Watch",
        '+     changes=("model.norm",),',
        "-     schedule=Schedule(steps=270, batch_size=16, micro_batch_size=8, validate_every=90),",
        "+     schedule=Schedule(steps=270, batch_size=16, micro_batch_size=8, validate_every=90, log_every=5),",
        "+     watch=Watch(spike=5.0),",
    ]
    many = edited(GOOD, changes=tuple(f"model.{'x' * 20}{i}" for i in range(9)))
    assert len(changed_lines(GOOD, many)) == 11 and max(map(len, many.splitlines())) <= 140


@pytest.mark.parametrize(
    "imports",
    [
        "from research.config import (\n    GPT,\n    Data,  # the text\n    Experiment, Optimizer, Parallel, Sample, Schedule, Track,\n)",
        "from research.config import GPT, Data, Experiment, Optimizer, Parallel, \\\n    Sample, Schedule, Track",
        "from research.config import (GPT, Data, Experiment, Optimizer, Parallel, Sample, Schedule,\n    Track)",
        "from research.config.schema import GPT, Data, Experiment, Optimizer, Parallel, Sample, Schedule, Track",
        "from research.config import *",
    ],
)
def test_a_missing_group_comes_with_its_import(imports: str) -> None:
    text = f"{imports}\n\nconfig = {BODY}"
    result = edited(text, checkpoints__every=10, evaluate__every=5, profile__memory=True)
    assert "# the text" in result or "# the text" not in text
    assert result.count("import") == 1


REFUSED = {
    "a function's result": (f"{HEAD}def make():\n    return {BODY}\nconfig = make()\n", "config = make()", "make()"),
    "a condition": (f"{HEAD}small = {BODY}\nconfig = small if True else None\n", "config = small", "small if True else None"),
    "two assignments": (f"{GOOD}\nconfig = config\n", "config = config", "config"),
    "a choice by a key": (f"{HEAD}sizes = {{1: {MODEL}}}\nconfig = {BODY.replace(MODEL, 'sizes[1]')}", "model=sizes", "sizes[1]"),
    "a loop": (f"{HEAD}for i in range(2):\n    config = {BODY.replace(chr(10), chr(10) + '    ')}", "config = Exp", "config"),
    "an import": ("from tests.research.ablation.test_source_edit import imported\n\nconfig = imported\n", "config = imp", "imported"),
    "a copy of an import": (
        "from tests.research.ablation.test_source_edit import imported\n\nconfig = imported.model_copy(update={'seed': 2})\n",
        "config = imp", "imported",
    ),
    "an arithmetic assignment": (f"{GOOD}config.model.num_layers += 0\n", "+= 0", "config.model.num_layers += 0"),
}  # fmt: skip
imported = run(GOOD)


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_edited_is_refused_with_its_line(form: str) -> None:
    text, at, shown = REFUSED[form]
    name, value = ("model.num_layers", 5) if "+=" in at else ("model.norm", "rmsnorm")
    run(text)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if at in content)
    said = sentence(lambda: with_settings(text, {name: value}, "mine/config.py"))
    assert said.startswith(f"mine/config.py:{line}: {name} comes from `{shown}`, which cannot be edited → write config = Experiment(")


def test_a_circle_of_names_ends() -> None:
    text = "a = b\nb = a\nconfig = a\n"
    assert "cannot be edited" in sentence(lambda: with_settings(text, {"seed": 1}, "mine/config.py"))


def test_literals_evaluate_to_their_values() -> None:
    for value in (
        "a",
        'say "a"',
        "it's",
        "a\nb\\",
        "½ Ünïcode",
        "\u202e",
        1,
        -1,
        1e-5,
        0.1 + 0.2,
        True,
        None,
        (),
        ("a",),
        (0.9, 0.95),
        ("a", "b"),
    ):
        assert eval(literal(value)) == value
    assert literal("it is plain") == '"it is plain"'
    for value in (float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            literal(value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends_are_kept(encoding: str, end: str, tmp_path: Path) -> None:
    text = f"# -*- coding: {encoding} -*-\n" + GOOD.replace("tessera", "größe")
    raw = text.replace("\n", end).encode(encoding)
    found, *how = decoded(raw, "config.py")
    assert found == text and encoded(found, *how) == raw
    result = encoded(with_settings(found, {"seed": 5}, "config.py")[0], *how)
    assert result == raw.replace(b"seed=1", b"seed=5")
    assert "mixes the line ends" in sentence(lambda: decoded(raw + b"\r\n\n", "config.py"))
    if encoding == "latin-1":
        assert "latin-1 lacks" in sentence(lambda: encoded("…", *how)).replace("iso-8859-1, which", "latin-1")
