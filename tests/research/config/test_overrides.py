"""Settings from argv: typed, judged together, recorded; whatever is wrong is one sentence and never a box."""

import pytest

from research.config import BERT, GPT, T5, Experiment
from research.config.overrides import Options, parse, show_help, usage
from research.config.settings import is_group, names
from tests.research.helpers.example import example, sentence

FILE_ONLY = "deepspeed is a table and lives in the file only → write deepspeed={…} in config.py"


def test_settings_are_typed_and_recorded() -> None:
    argv = ["--local_rank=1", "--optimizer.lr", "3e-4", "--optimizer.betas", "0.9", "0.99", "--model.bias=False", "--parallel.tensor", "2"]
    changed, overrides, options = parse(example(), argv)
    expected = example(optimizer={"lr": 3e-4, "betas": (0.9, 0.99)}, model={"bias": False}, parallel={"tensor": 2})
    assert changed == expected
    assert overrides == [
        ("optimizer.lr", 3e-3, 3e-4),
        ("optimizer.betas", (0.9, 0.95), (0.9, 0.99)),
        ("model.bias", True, False),
        ("parallel.tensor", 1, 2),
    ]
    assert options == Options()


def test_the_given_experiment_is_left_alone() -> None:
    given = example()
    parse(given, ["--seed", "2", "--model.num_layers", "2"])
    assert given == example()


@pytest.mark.parametrize("word", ["--schedule.batch_size", "--schedule.batch-size"])
def test_dashes_or_underscores(word: str) -> None:
    assert parse(example(), [word, "32"])[0].schedule.batch_size == 32


def test_settings_are_judged_together() -> None:
    """8 heads alone would not go with the file's 6 kv heads."""
    assert parse(example(), ["--model.num_heads", "8", "--model.num_kv_heads", "4"])[0].model.num_kv_heads == 4
    assert "model.num_kv_heads = 6 does not divide model.num_heads = 8" in sentence(lambda: parse(example(), ["--model.num_heads", "8"]))


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--parallel.offload_optimizer"], True),
        (["--parallel.offload_optimizer", "true"], True),
        (["--parallel.offload_optimizer", "False"], False),
    ],
)
def test_switches(argv: list[str], value: bool) -> None:
    assert parse(example(), argv)[0].parallel.offload_optimizer is value


def test_none_and_text() -> None:
    assert parse(example(parent="a"), ["--parent", "None"])[0].parent is None
    assert parse(example(), ["--track.group", "my group"])[0].track.group == "my group"
    assert parse(example(), ["--question=--really?"])[0].question == "--really?"
    rotary = ["--model.position", "rotary", "--model.rotary_fraction", "1", "--model.rotary_base", "1e4", "--model.rotary-scaling", "none"]
    assert parse(example(), rotary)[0].model.rotary_base == 1e4
    assert parse(example(), ["--optimizer.betas", "(0.8, 0.9)"])[0].optimizer.betas == (0.8, 0.9)
    assert parse(example(), ["--optimizer.betas=0.8,0.9"])[0].optimizer.betas == (0.8, 0.9)


def test_the_last_of_two_counts_and_no_change_is_no_override() -> None:
    changed, overrides, _ = parse(example(), ["--seed", "5", "--seed", "6", "--precision", "fp32"])
    assert (changed.seed, overrides) == (6, [("seed", 1, 6)])


@pytest.mark.parametrize("local", [["--local_rank=3"], ["--local-rank", "3"], []])
def test_options(local: list[str]) -> None:
    assert parse(example(), [*local, "--dry-run", "--verbose"])[1:] == ([], Options(dry_run=True, verbose=True))
    assert parse(example(), [*local, "--dry_run"])[2] == Options(dry_run=True)
    assert parse(example(), [*local, "--rehash", "--resume", "auto"])[1:] == ([], Options(rehash=True, resume="auto"))
    assert parse(example(), [*local, "--nonsense", "--help"])[2] == Options(help=True)
    assert parse(example(), [*local, "--help", "--verbose"])[2] == Options(help=True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.num_head", "3"], "model.num_head is not a setting → did you mean model.num_heads?"),
        (["--model.num-head", "3"], "model.num_head is not a setting → did you mean model.num_heads?"),
        (["--lr", "3"], "lr is not a setting → did you mean optimizer.lr?"),
        (["--modle.num_heads", "3"], "modle.num_heads is not a setting → did you mean model.num_heads?"),
        (["--dryrun"], "dryrun is not a setting → did you mean --dry-run?"),
        (["--zzz"], "zzz is not a setting → launch.py --help lists them all"),
        (["--model.num_layers.x", "3"], "model.num_layers.x is not a setting → did you mean model.num_layers?"),
        (["--model.num_heads"], "--model.num_heads has no value → give it a whole number greater than 0, now: 6"),
        (["--optimizer.lr", "--seed", "3"], "--optimizer.lr has no value → give it a finite number greater than 0, now: 0.003"),
        (["--model.num_heads", "six"], "model.num_heads = 'six' does not work → use a whole number greater than 0"),
        (["--model.num_heads", "6", "6"], "model.num_heads = '6 6' does not work → use a whole number greater than 0"),
        (["--model.num_heads", "-1"], "model.num_heads = -1 does not work → use a whole number greater than 0"),
        (["--optimizer.lr", "-1e-3"], "optimizer.lr = -0.001 does not work → use a finite number greater than 0"),
        (["--optimizer.lr", "nan"], "optimizer.lr = nan does not work → use a finite number greater than 0"),
        (["--optimizer.betas", "0.9"], "optimizer.betas = '0.9' does not work → use 2 values, each a finite number at least 0 and below 1"),
        (["--precision", "fp8"], "precision = 'fp8' does not work → use fp32, bf16 or fp16"),
        (["--model.bias", "maybe"], "model.bias = 'maybe' does not work → use True or False"),
        (["--question", "why", "not"], '--question takes one value, got 2 → put quotes around it: --question "why not"'),
        (["--model", "3"], "model is a group of settings → name one of them, for example --model.num_layers"),
        (["--deepspeed.bf16", "1"], f"--deepspeed.bf16: {FILE_ONLY}"),
        (["--deepspeed_config", "x"], f"--deepspeed_config: {FILE_ONLY}"),
        (["--dry-run", "3"], "--dry-run takes no value, got '3' → write it alone"),
        (["--local-rank", "1", "seed=3"], "'seed=3' belongs to no setting → write --group.name value, for example --parallel.tensor 2"),
        (["--optimizer.betas=0.9", "0.95"], "'0.95' belongs to no setting → write --group.name value, for example --parallel.tensor 2"),
        (["seed=3"], "'seed=3' belongs to no setting → write --group.name value, for example --parallel.tensor 2"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_else(argv: list[str], said: str, capfd) -> None:
    assert sentence(lambda: parse(example(), ["--local_rank=0", *argv])) == said
    assert capfd.readouterr() == ("", "")


def test_every_setting_can_be_given_and_read_back() -> None:
    """Whatever a value looks like when it is written, the command line reads it as that value."""
    given = example(parent="p", optimizer={"decay": "wsd", "decay_steps": 7})
    for name in values():
        old: object = given
        for part in name.split("."):
            old = getattr(old, part)
        words = [str(part) for part in old] if isinstance(old, tuple) else [str(old)]
        changed, overrides, _ = parse(given, [f"--{name}", *words])
        assert (changed, overrides) == (given, []), name


def test_help_teaches(capsys) -> None:
    show_help(example(deepspeed={"a": 1}), "x/launch.py")
    said = capsys.readouterr().out
    assert "does it work?" in said
    for start in ("deepspeed --num_gpus 2 x/launch.py", "python x/launch.py", "torchrun", "srun", "--dry-run", "--verbose"):
        assert start in said
    for name in values():
        assert f"--{name} " in said, name
    assert "(default: 0.003)" in said
    assert "sequences per step, over all ranks" in said


def test_help_starts_an_experiment_on_its_own_layout() -> None:
    said = usage(example(parallel={"tensor": 2, "pipe": 2}), "x/launch.py").splitlines()
    assert "  4 ranks here:    deepspeed --num_gpus 4 x/launch.py" in said
    assert "  or else:         torchrun --nproc_per_node 4 x/launch.py" in said
    assert "  one rank:        python x/launch.py --parallel.pipe 1 --parallel.tensor 1" in said


def test_help_shows_a_layout_where_the_experiment_has_none() -> None:
    said = usage(example(), "x/launch.py").splitlines()
    assert "  2 ranks here:    deepspeed --num_gpus 2 x/launch.py --parallel.tensor 2" in said
    assert "  one rank:        python x/launch.py" in said


def values() -> list[str]:
    """The dotted name of every setting that may be given on the command line of a GPT."""
    groups = {name for name, field in Experiment.model_fields.items() if is_group(field)}
    others = {*names(BERT, "model"), *names(T5, "model")} - {*names(GPT, "model")}
    return [name for name in names(Experiment) if name not in groups | others | {"deepspeed"}]


def test_help_of_one_group_lists_its_settings_and_no_other(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help", "optimizer"], ["--seed", "3", "-h", "optimizer"], ["--help", "optimizer.lr"]):
        options = parse(example(), words)[2]
        show_help(example(), "x/launch.py", options.help_group)
        shown = capsys.readouterr().out
        listed = {word.removeprefix("--") for word in shown.split() if word.startswith("--") and "." in word}
        assert listed == {name for name in names(Experiment) if name.startswith("optimizer.")}
        assert max(map(len, shown.splitlines())) <= 80
    for word, way_out in (("optimizr", "use optimizer"), ("lr", "use optimizer"), ("xyz", "use model, data, ")):
        said = sentence(lambda word=word: show_help(example(), "x/launch.py", word))  # type: ignore[misc]
        assert said.startswith(f"--help {word} is not a group of settings → {way_out}")


def test_version_is_an_option_and_shows_nothing_else() -> None:
    assert parse(example(), ["--local_rank=0", "--version", "--nonsense"])[2] == Options(version=True)


def test_check_cluster_is_an_option_and_no_setting() -> None:
    assert parse(example(), ["--check-cluster", "--parallel.tensor", "2"])[2] == Options(check_cluster=True)
    assert "--check-cluster takes no value, got 'yes'" in sentence(lambda: parse(example(), ["--check-cluster", "yes"]))
