"""Forks: `diff -r` shows what was asked for and no more, the copy loads as the parent with the changes, and bad input changes nothing."""

import filecmp
import os
import shutil
from pathlib import Path

import pytest

from research.ablation.fork import Fork, fork
from research.ablation.lineage import Family, problems
from research.cli import fork as verb
from research.config.diff import belongs
from research.config.experiment_folder import load
from research.config.overrides import parse
from research.config.serialization import resolved
from tests.research.ablation.test_source_edit import changed_lines
from tests.research.helpers.example import sentence

SHIPPED = ("gpt_sotu", "gpt_sotu_3d", "gpt_sotu_dyt", "llama_sotu")
SETTINGS = {
    "a text": ["model.mlp=relu"],
    "a number": ["optimizer.lr=1e-3"],
    "a pair": ["optimizer.betas=0.9,0.98"],
    "a switch": ["model.tied=false"],
    "three numbers or none": ["schedule.batch_ramp=8,8,64"],
    "not written": ["schedule.validate_tokens=4096", "model.head_size=16"],
    "a group that is not written": ["watch.spike=5", "checkpoints.keep_last=3"],
    "several texts": ["sample.prompts=We", "sample.prompts=the people, of", "data.train=a.txt", "data.train=b.txt"],
    "of the experiment": ["seed=2", "precision=bf16", "question=why?"],
    "of every kind": ["model.num_layers=6", "optimizer.decay=wsd", "optimizer.decay_steps=50", "parallel.zero_stage=2"],
}


SCIENCE = ("model", "optimizer", "data", "seed", "precision", "schedule.batch_ramp")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_is_forked_and_is_the_parent_with_the_change(name: str, kind: str, experiments: Path) -> None:
    """The truth is the command line of a launch, which reads the same settings another way."""
    parent, given = load(experiments / name).experiment, SETTINGS[kind]
    if name == "gpt_sotu_3d":
        given = [setting for setting in given if setting != "parallel.zero_stage=2"]  # does not go with pipe 2
    words: dict[str, list[str]] = {}
    for setting in given:
        key, _, value = setting.partition("=")
        words.setdefault(key, []).extend(value.split(",") if "ramp" in key else [value])
    expected, overrides, _ = parse(parent, [word for key, values in words.items() for word in (f"--{key}", *values)])
    made = fork(experiments / name, experiments / "mine", given)

    found = load(experiments / "mine").experiment
    own = {"parent": name, "changes": list(found.changes)}
    assert resolved(found) == resolved(expected) | own
    assert found.model == expected.model
    changed = {override[0] for override in overrides} - {"question"}
    assert {change[0] for change in made.changes + made.plumbing} == changed
    assert set(found.changes) == {change for change in changed if belongs(change, SCIENCE)}
    assert problems(Family(experiments).member("mine"), Family(experiments)) == []

    then, now = files(experiments / name), files(experiments / "mine")
    assert [file for file in then if then[file] != now[file]] == ["config.py"] and then.keys() == now.keys()
    edits = changed_lines(then["config.py"].decode(), now["config.py"].decode())
    taken_out = [line for line in edits if line[0] == "-" and not line.startswith('-         "') and line != "-     ),"]
    assert len(taken_out) <= len(given) + 3  # llama_sotu's own changes stand on lines of their own


def test_diff_shows_what_was_asked_for(experiments: Path, capsys: pytest.CaptureFixture) -> None:
    verb.main(["gpt_sotu", "mine", "--set", "model.norm=rmsnorm", "--set", "track.tags=a", "--question", "is it better?"])
    assert capsys.readouterr().out.splitlines() == [
        "experiments/mine · a fork of gpt_sotu",
        "changes  model.norm layernorm → rmsnorm",
        "besides  track.tags [] → ['a'] (affects no result)",
        "next   python experiments/mine/launch.py --dry-run",
        "       python -m research diff experiments/gpt_sotu experiments/mine",
    ]
    texts = [(experiments / name / "config.py").read_text() for name in ("gpt_sotu", "mine")]
    assert changed_lines(*texts) == [
        '-     question="Does a small GPT learn the language of the State of the Union in a few minutes on two CPU cores?",',
        "-     parent=None,",
        '+     question="is it better?",',
        '+     parent="gpt_sotu",',
        '+     changes=("model.norm",),',
        '-         norm="layernorm",',
        '+         norm="rmsnorm",',
        '-     track=Track(project="tessera"),',
        '+     track=Track(project="tessera", tags=("a",)),',
    ]
    assert filecmp.cmp(experiments / "gpt_sotu" / "launch.py", experiments / "mine" / "launch.py", shallow=False)


def test_what_belongs_to_the_folder_is_copied_and_caches_are_not(experiments: Path) -> None:
    source = experiments / "gpt_sotu_dyt"
    for name in ("notes/plan.md", "tokens.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("kept")
    for name in ("__pycache__/config.cpython-311.pyc", "runs/a/run.json", ".cache/x", ".ipynb_checkpoints/y", "config.py~", "wandb/z"):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text("not kept")
    (source / "link.txt").symlink_to("tokens.txt")
    os.mkfifo(source / "pipe")
    for path in (source / "config.py", source):
        path.chmod(0o555)
    made = fork(source, experiments / "mine")
    assert sorted(files(made.folder)) == ["config.py", "launch.py", "link.txt", "notes/plan.md", "tokens.txt", "variant.py"]
    assert (made.folder / "link.txt").is_symlink()
    assert (made.folder / "config.py").stat().st_mode & 0o300 == 0o200  # writable, and no program
    source.chmod(0o755)
    assert load(experiments / "mine").experiment.changes == ()


def test_a_link_to_a_config_is_not_written_through(experiments: Path) -> None:
    shared = experiments / "gpt_sotu" / "config.py"
    before = shared.read_bytes()
    shutil.copytree(experiments / "gpt_sotu", experiments / "linked")
    (experiments / "linked" / "config.py").unlink()
    (experiments / "linked" / "config.py").symlink_to("../gpt_sotu/config.py")
    fork(experiments / "linked", experiments / "mine", ["seed=2"])
    assert shared.read_bytes() == before and load(experiments / "mine").experiment.seed == 2
    assert not (experiments / "mine" / "config.py").is_symlink()


def test_a_fork_of_a_fork_declares_its_own_changes(experiments: Path) -> None:
    fork(experiments / "gpt_sotu", experiments / "a", ["seed=2"])
    fork(experiments / "a", experiments / "b", ["optimizer.lr=0.1"])
    found = load(experiments / "b").experiment
    assert (found.parent, found.changes, found.seed) == ("a", ("optimizer.lr",), 2)


def test_a_text_of_ones_own(experiments: Path) -> None:
    (experiments.parent / "book.txt").write_text("We the people. " * 100)
    made = fork(experiments / "gpt_sotu", experiments / "mine", ["data.tokenizer=builtin:bytes"], text=Path("book.txt"))
    found = load(experiments / "mine").experiment
    assert (found.data.train, found.data.validation, found.model.vocab_size) == ("book.txt", "split:0.05", 257)
    assert set(found.changes) == {"data.train", "data.validation", "data.tokenizer", "model.vocab_size"} and isinstance(made, Fork)

    corpus = experiments.parent / "corpora" / "mine"
    corpus.mkdir(parents=True)
    for name in ("train.idx", "val.idx"):
        (corpus / name).touch()
    (corpus / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 300}, "merges": []}, "added_tokens": []}')
    fork(experiments / "gpt_sotu", experiments / "other", text=corpus)
    found = load(experiments / "other").experiment
    assert (found.data.train, found.data.validation) == ("store:corpora/mine/train", "store:corpora/mine/val")
    assert (found.data.tokenizer, found.model.vocab_size) == ("corpora/mine/tokenizer.json", 301)


CONFIG = "experiments/gpt_sotu/config.py"
BAD = {
    "an unknown setting": (["gpt_sotu", "b", "--set", "model.nrom=rmsnorm"], "model.nrom is not a setting → did you mean model.norm?"),
    "a group": (["gpt_sotu", "b", "--set", "model=x"], "model is a group of settings → name one of them"),
    "a table": (["gpt_sotu", "b", "--set", "deepspeed=x"], "deepspeed is a table and lives in the file only"),
    "no value": (["gpt_sotu", "b", "--set", "seed"], "'seed' gives no setting a value → write NAME=VALUE, such as model.norm=rmsnorm"),
    "a wrong value": (["gpt_sotu", "b", "--set", "seed=x"], "seed = 'x' does not work → use a whole number at least 0"),
    "two values": (["gpt_sotu", "b", "--set", "seed=2", "--set", "seed=3"], "seed is given 2 values, 2 and 3 → give it one"),
    "a value that is not known": (["gpt_sotu", "b", "--set", "model.norm=x"], "model.norm = 'x' is not known → use layernorm, rmsnorm or"),
    "what contradicts the rest": (["gpt_sotu", "b", "--set", "model.num_heads=4"], "model.num_kv_heads = 6 does not divide"),
    "what does not divide": (["gpt_sotu", "b", "--set", "schedule.micro_batch_size=3"], "schedule.batch_size = 16 is not a multiple of"),
    "a layout that does not fit": (["gpt_sotu", "b", "--set", "parallel.tensor=4"], "parallel.tensor = 4 does not divide model.num_heads"),
    "what is there already": (["gpt_sotu", "b", "--set", "seed=1"], "seed = 1 is what gpt_sotu has already → leave --set seed out"),
    "what fork writes": (["gpt_sotu", "b", "--set", "parent=a"], "--set parent is what fork writes itself → leave it out"),
    "a class without a file": (
        ["gpt_sotu", "b", "--set", "model.norm=variant:N"],
        "model.norm = 'variant:N' but experiments/b has no variant.py",
    ),
    "a class that is not there": (
        ["gpt_sotu_dyt", "b", "--set", "model.norm=variant:DynamicTan"],
        "model.norm = 'variant:DynamicTan', and b/variant.py defines no DynamicTan → did you mean DynamicTanh?",
    ),
    "a taken name": (["gpt_sotu", "llama_sotu", "--set", "seed=2"], "llama_sotu is there already → name a folder that is not"),
    "another place": (["gpt_sotu", "elsewhere/b"], "elsewhere/b is not the place of an experiment → write experiments/NAME"),
    "a bad name": (["gpt_sotu", "a b"], "a b is not the place of an experiment → write experiments/NAME"),
    "no experiment": (["gpt_sot", "b"], "gpt_sot has no config.py → did you mean experiments/gpt_sotu?"),
    "no text": (["gpt_sotu", "b", "--text", "book.txt"], "--text book.txt does not exist → name a file or folder of text"),
    "an empty question": (["gpt_sotu", "b", "--question", ""], "question = '' does not work → use text that is not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(case: str, experiments: Path) -> None:
    argv, said = BAD[case]
    before = files(experiments)
    assert said in sentence(lambda: verb.main(argv))
    assert files(experiments) == before and sorted(path.name for path in experiments.iterdir()) == list(SHIPPED)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("seed=1", "seed=one"), "config.py:52: NameError: name 'one' is not defined"),
        (
            ("seed=1,\n)", "seed=1,\n)\nsetattr(config, 'seed', 1)"),
            "experiments/gpt_sotu/config.py:52: the file decides a setting elsewhere as well: edited there",
        ),
        (("seed=1,\n)", "seed=1,\n) if True else None"), "experiments/gpt_sotu/config.py:5: parent comes from `Experiment("),
        (("GPT(\n", "GPT(\n        **{'num_layers': 4},\n", "        num_layers=4,\n", ""), ""),
        (
            ("model=GPT(", "model=make(", "config =", "make = GPT\nconfig =", "num_layers=4", "num_layers=2"),
            "experiments/gpt_sotu/config.py:9: model.num_layers comes from `make(",
        ),
        (("config =", "SEED = 1\nconfig =", "seed=1", "seed=SEED"), ""),
    ],
)
def test_a_parent_that_cannot_be_edited_is_refused_with_its_line(edit: tuple[str, ...], said: str, experiments: Path) -> None:
    path = experiments / "gpt_sotu" / "config.py"
    text = path.read_text()
    for old, new in zip(edit[::2], edit[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    act = lambda: fork(experiments / "gpt_sotu", experiments / "b", ["seed=2", "model.num_layers=3"])  # noqa: E731
    if said:
        assert said in sentence(act)
        assert not (experiments / "b").exists() and len(list(experiments.iterdir())) == len(SHIPPED)
    else:
        act()
        assert load(experiments / "b").experiment.seed == 2


def test_a_parent_elsewhere_is_refused(experiments: Path, tmp_path: Path) -> None:
    shutil.copytree(experiments / "gpt_sotu", tmp_path / "gpt_sotu")
    assert "does not lie beside b" in sentence(lambda: fork(tmp_path / "gpt_sotu", experiments / "b"))
