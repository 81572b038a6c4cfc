"""A result of lm-evaluation-harness is known until one of the files changes that it was computed from, wherever that file is."""

import json
from pathlib import Path

import pytest

from research.cli import evaluate
from research.evaluation.lm_eval_files import files_of, opened_by
from tests.research.helpers import untrained

pytest.importorskip("lm_eval")

BASE = """
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: "{{gold}}"
process_docs: !function helper.process
metric_list: [{metric: acc}]
"""
HELPER = """
import pathlib
import TWIN

def process(docs):
    ending = pathlib.Path(__file__).with_name("ending.txt").read_text()
    return docs.map(lambda doc: {**doc, "query": doc["query"] + ending + TWIN.MARK})
"""
ROWS = [
    {"query": f"the people of the {a}", "choices": ["jobs", "in peace", "½ of them"], "gold": i} for i, a in enumerate(("union", "war"))
]


def written(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path.resolve()


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a folder tasks/ whose one YAML file refers to what lies beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    twin = f"twin_{tmp_path.name}"  # a module is imported once in a process
    written(tmp_path / f"{twin}.py", "MARK = '.'\n")
    written(tmp_path / "shared" / "helper.py", HELPER.replace("TWIN", twin))
    written(tmp_path / "shared" / "ending.txt", ":")
    written(tmp_path / "shared" / "base_yaml", BASE)
    written(tmp_path / "data" / "test.jsonl", jsonl(ROWS))
    written(
        tmp_path / "tasks" / "mine.yaml",
        "include: ../shared/base_yaml\ntask: mine\ndataset_kwargs: {data_files: {test: data/test.jsonl}}\n",
    )
    return tmp_path


def test_files_are_found_by_the_rules_of_the_harness_and_of_datasets(place):
    """Includes of includes, patterns, folders, archives, a package that Python would import, tasks within a group."""
    outside = {
        written(place / "shared" / name, "x")
        for name in (
            "second.jsonl",
            "few/a.jsonl",
            "few/b.jsonl",
            "all/a.csv",
            "all/deep/b.csv",
            "archive.zip",
            "package/__init__.py",
            "package/more.py",
        )
    }
    outside |= {written(place / "shared" / "top_yaml", "include: [base_yaml, absent_yaml]\n"), written(place / "broken_yaml", "a: [")}
    written(
        place / "tasks" / "b.yaml",
        "task: b\ninclude: ../shared/top_yaml\ndataset_kwargs: {data_files: [shared/second.jsonl, shared/f*/*.jsonl]}",
    )
    group = "group: g\ntask:\n- {task: c, dataset_path: shared/all}\n- {task: d, dataset_kwargs: {data_files: 'zip://a.jsonl::shared/archive.zip'}}\n"
    written(place / "tasks" / "g.yaml", f"include: ../broken_yaml\nprocess_docs: !function shared.package.more.f\n{group}")
    written(place / "tasks" / "weights.bin", "not read, but in the folder")
    expected = outside | {
        path.resolve()
        for path in [*place.glob("tasks/*"), *place.glob("data/*"), *place.glob("shared/*_yaml"), place / "shared" / "helper.py"]
    }
    found = files_of(Path("tasks"))
    assert set(found.paths) == expected and found.complete
    written(place / "tasks" / "h.yaml", "task: h\ncustom_dataset: !function helper.make\n")
    assert not files_of(Path("tasks")).complete


CHANGES = {
    "a data file outside of the folder": ("data/test.jsonl", jsonl(ROWS[:1])),
    "an included file": ("shared/base_yaml", BASE.replace("{{query}}", "{{query}} ")),
    "a helper": ("shared/helper.py", None),
    "a file that a helper opens": ("shared/ending.txt", "!"),
    "a module that a helper imports": ("twin", "MARK = '?'\n"),
    "a new file that a pattern matches": ("data/test_2.jsonl", jsonl(ROWS)),
}


def test_what_a_result_was_computed_from_makes_it_stale(place, capsys, monkeypatch, lm_eval_offline):
    """Evaluated again after each change, and known again until the next."""
    run = untrained.make(place)
    definition = "include: ../shared/base_yaml\ntask: mine\ndataset_kwargs: {data_files: {test: 'data/*.jsonl'}}\n"
    written(place / "tasks" / "mine.yaml", definition)

    def known() -> bool:
        evaluate.main([str(run.path), "--tasks", "lm_eval:mine", "--lm_eval_tasks", "tasks", "--json"])
        captured = capsys.readouterr()
        assert json.loads(captured.out)["metrics"]
        return "known already: lm_eval:mine" in captured.err

    assert not known() and known()
    for what, (name, content) in CHANGES.items():
        path = place / f"twin_{place.name}.py" if name == "twin" else place / name
        written(path, content or path.read_text() + "\n# changed\n")
        assert not known(), what
        assert known(), what
    (result,) = {row["task"]: row for row in json.loads((run.path / "evaluations" / "step_000003.json").read_text())["results"]}.values()
    inside = {Path(path).name for path in result["files"] if Path(path).is_relative_to(place)}
    assert inside == {"ending.txt", f"twin_{place.name}.py"}


def test_data_that_python_makes_are_never_known(place, capsys, lm_eval_offline):
    run = untrained.make(place)
    written(
        place / "tasks" / "helper.py",
        "import datasets\ndef make(**_):\n    return {'test': datasets.Dataset.from_list(" + repr(ROWS) + ")}\n",
    )
    written(
        place / "tasks" / "mine.yaml",
        BASE.replace("process_docs: !function helper.process", "custom_dataset: !function helper.make\ntask: mine"),
    )
    for _ in range(2):
        evaluate.main([str(run.path), "--tasks", "lm_eval:mine", "--lm_eval_tasks", "tasks", "--json"])
        captured = capsys.readouterr()
        assert json.loads(captured.out)["examples"] == 2 and "known already" not in captured.err


def test_only_what_a_helper_opens_is_observed(tmp_path):
    read, other, new = (written(tmp_path / name, "x") for name in ("read.txt", "other.txt", "new.txt"))
    code = f"def f():\n    open({str(read)!r}).close()\n    open({str(new)!r}, 'w').close()\n    import colorsys\n"
    helper, namespace = written(tmp_path / "helper.py", code), dict[str, object]()
    exec(compile(code, str(helper), "exec"), namespace)
    with opened_by([helper]) as found:
        other.read_text()
        namespace["f"]()  # type: ignore[operator]
    assert {path for path in found if path.is_relative_to(tmp_path)} == {read}
    found.clear()
    namespace["f"]()  # type: ignore[operator]
    assert not found, "the hook is switched off"
