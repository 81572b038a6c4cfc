"""What `compare` makes of runs written by hand: pairs, values, verdicts, changes, and each refusal with its reason."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.estimates.flops import training_flops
from parallel.errors import Mistake
from research.ablation.comparison import BEST, Comparison, Question, _warnings_of_changes, compare
from research.ablation.sides import find_sides
from research.ablation.statistics import Verdict
from research.config import Data, Evaluate, Source
from tests.research.ablation.helpers.finished_runs import NUM_BYTES, NUM_TOKENS, TOKENS_PER_STEP, write_run
from tests.research.helpers.example import example, sentence

stats = pytest.importorskip("scipy.stats", reason="scipy is in requirements-dev.txt")
BITS = NUM_TOKENS / math.log(2) / NUM_BYTES
"""Bits per byte for one nat per token."""
A, B = {1: 3.00, 2: 3.10, 3: 3.05}, {1: 2.90, 2: 3.01, 3: 2.94}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def write(runs: Path, name: str, losses: dict[int, float], **settings) -> None:
    for seed, loss in losses.items():
        write_run(runs, name, seed, [loss + 1, loss], **settings)


def compared(*words: str, **question) -> Comparison:
    return compare(find_sides(words), Question(**question))


def test_runs_are_paired_by_seed_and_tested_as_scipy_does(runs: Path) -> None:
    write(runs, "a", A)
    write(runs, "b", B | {4: 9.9}, model={"norm": "rmsnorm"})
    comparison = compared("a", "b")
    (variant,) = comparison.variants
    expected = stats.ttest_rel([B[seed] * BITS for seed in A], [A[seed] * BITS for seed in A])
    assert variant.seeds == (1, 2, 3) and variant.effect.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert variant.differences == pytest.approx([(B[seed] - A[seed]) * BITS for seed in A])
    assert variant.verdict is Verdict.BETTER and variant.adjusted_p == variant.effect.p
    assert variant.changes == (("model.norm", "layernorm", "rmsnorm"),)
    assert comparison.place == 200 * TOKENS_PER_STEP and comparison.cut == ()
    said = " · ".join(variant.warnings)
    assert "seed 4 of a and b has no partner" in said and "b has 3,375,552 parameters, a 3,377,280 (-0.05 %)" in said
    # the other direction, and another metric of which more is better
    assert compared("b", "a").variants[0].verdict is Verdict.WORSE
    assert compared("a", "b", metric="val/loss", better="higher").variants[0].verdict is Verdict.WORSE


def test_holm_over_variants_takes_back_what_one_alone_would_tell(runs: Path) -> None:
    write(runs, "a", A)
    noisy = {1: 2.99, 2: 3.00, 3: 2.96}  # p between 0.025 and 0.05 against a
    for name in ("b", "c"):
        write(runs, name, noisy, optimizer={"lr": 1e-3 if name == "b" else 2e-3})
    alone = compared("a", "b").variants[0]
    both = compared("a", "b", "c").variants
    assert [variant.adjusted_p for variant in both] == pytest.approx([2 * alone.effect.p] * 2)


def test_one_pair_tells_nothing_and_few_say_how_many_more(runs: Path) -> None:
    write(runs, "a", A)
    write(runs, "b", {1: 2.0}, optimizer={"lr": 1e-3})
    (variant,) = compared("a", "b").variants
    assert variant.verdict is Verdict.NOT_DISTINGUISHABLE and variant.more_seeds is None
    write(runs, "c", {1: 3.02, 2: 3.08, 3: 3.06}, optimizer={"lr": 2e-3})
    observed, small = (compared("a", "c", smallest=smallest).variants[0] for smallest in (None, 0.01))
    assert observed.verdict is small.verdict is Verdict.NOT_DISTINGUISHABLE
    assert observed.target == pytest.approx(abs(observed.effect.mean)) and small.target == 0.01
    assert observed.more_seeds is not None and small.more_seeds is not None and observed.more_seeds > small.more_seeds > 0


def test_final_and_best_at_the_place_where_the_shortest_ends(runs: Path) -> None:
    for seed in (1, 2):
        write_run(runs, "a", seed, [4.0, 3.0, 3.5])
        write_run(runs, "b", seed, [4.0, 3.2], seconds_per_step=1.0, schedule={"steps": 300})
    final, best = (compared("a", "b", metric="val/loss", value=value) for value in ("final", BEST))
    assert final.place == 200 * TOKENS_PER_STEP and final.cut == ("a",)
    assert final.values["a"][1].final == 3.0 and final.variants[0].differences == pytest.approx([0.2, 0.2])
    assert best.variants[0].differences == pytest.approx([0.2, 0.2])
    assert any("b takes 200 steps, a 300" in warning for warning in final.variants[0].warnings)
    steps = compared("a", "b", metric="val/loss", at="steps")
    assert steps.place == 200
    # by seconds a ends at 150 and b at 200: b's value is half way between its two rows
    seconds = compared("a", "b", metric="val/loss", at="seconds")
    assert seconds.place == 150 and seconds.values["b"][1].final == pytest.approx(3.6) and seconds.values["a"][1].best == 3.0


def test_changes_of_code_and_several_at_once_are_said(runs: Path) -> None:
    for name, scale in (("a", 1), ("b", 2)):
        for seed in (1, 2):
            folder = write_run(runs, name, seed, [3.0 + seed * scale], model={"norm": "variant:Mine"}, optimizer={"lr": scale * 1e-3})
            folder.source.mkdir()
            (folder.source / "variant.py").write_text(f"class Mine:\n    scale = {scale}\n")
    (variant,) = compared("a", "b").variants
    assert "-    scale = 1\n+    scale = 2" in variant.code
    assert "2 settings differ at once, optimizer.lr, variant.py: the difference is that of all together" in variant.warnings
    assert not any("parameters" in warning for warning in variant.warnings)  # the models are equal but for the class


def test_a_change_that_a_fork_does_not_declare_is_said_beside_its_parent_only(runs: Path) -> None:
    a, b = (find_sides([write_run(runs, name, 1, [3.0]).title])[0].first for name in ("a", "b"))
    changes = [("model.norm", "layernorm", "rmsnorm"), ("optimizer.lr", 0.003, 0.001)]
    fork = SimpleNamespace(changes=("model.norm",), parent="a")  # an Experiment that declares its changes
    (several, sneaked) = _warnings_of_changes(a, replace(b, experiment=fork), changes, "")
    assert sneaked == "b declares changes = model.norm, but optimizer.lr differs as well"
    fork.changes = ("model", "optimizer.lr")
    assert [*_warnings_of_changes(a, replace(b, experiment=fork), changes, "")] == [several]
    fork.changes, fork.parent = ("model.norm",), "another"
    assert [*_warnings_of_changes(a, replace(b, experiment=fork), changes, "")] == [several]


def test_equal_runs_have_no_effect_that_seeds_could_tell(runs: Path) -> None:
    for name in ("a", "b"):
        write(runs, name, A)
    none, small = (compared("a", "b", smallest=smallest).variants[0] for smallest in (None, 0.01))
    assert none.changes == small.changes == () and none.verdict is small.verdict is Verdict.NOT_DISTINGUISHABLE
    assert (none.more_seeds, small.more_seeds) == (None, 0)


def test_what_means_nothing_is_refused_with_the_reason(runs: Path) -> None:
    write(runs, "a", A)
    write(runs, "seeds", {7: 3.0, 8: 3.0})
    write(runs, "bytes", A, num_bytes=NUM_BYTES + 1)
    write(runs, "nan", {1: math.nan})
    other = {"train": "builtin:state_of_the_union/train", "validation": "other.txt", "tokenizer": "builtin:bpe-8192"}
    data = {"text": other, "tokenizer": other | {"validation": "builtin:state_of_the_union/val", "tokenizer": "builtin:bytes"}}
    data["train"] = data["tokenizer"] | {"train": "a.txt", "tokenizer": "builtin:bpe-8192"}
    for name, settings in data.items():
        write(runs, name, B, data=Data(**settings))
    write(runs, "limited", B, evaluate=Evaluate(limit=5))
    for words, question, message in (
        (["a"], {}, "compare needs two sides or more → "),
        (["a", "a"], {}, "is in two sides, a and a → name each run once"),
        (["a", "seeds"], {}, "a and seeds have no seed in common, 1, 2, 3 and 7, 8: runs are paired by seed → train seeds with --seed 1"),
        (["a", "seeds"], {"metric": "val/bit_per_byte"}, "has no row with val/bit_per_byte → did you mean val/bits_per_byte?"),
        (
            ["a", "seeds"],
            {"metric": "val/tokens"},
            "whether a higher val/tokens is better is not known → add --better lower or --better higher",
        ),
        (["a", "text"], {}, "val/bits_per_byte is of the held-out text: "),
        (["a", "text"], {}, "has other.txt → compare runs with one held-out text"),
        (["a", "bytes"], {}, "90,000 bytes of it"),
        (["a", "nan"], {}, "seed 1, is nan at the end: no mean over seeds contains it → "),
        (["a", "tokenizer"], {"metric": "val/loss"}, "val/loss is per token: "),
        (["a", "tokenizer"], {"metric": "val/loss"}, "the tokenizer builtin:bytes → compare --metric val/bits_per_byte"),
        (["a", "train"], {"metric": "val/loss"}, "has the tokenizer builtin:bpe-8192 of a.txt"),
        (["a", "train"], {"metric": "train/loss"}, "train/loss is of the training text: "),
    ):
        assert message in sentence(lambda words=words, question=question: compared(*words, **question)), message
    # bytes are bytes, whatever the tokenizer and the training text
    assert compared("a", "tokenizer").variants[0].verdict is compared("a", "train").variants[0].verdict is Verdict.BETTER


def test_the_texts_of_a_split_the_examples_of_a_task_and_files_that_changed(runs: Path) -> None:
    web = Source(path="web", weight=1.0)
    for name, train in (("one", "web"), ("two", (web, Source(path="code", weight=1.0)))):
        write(runs, name, A, data=Data(train=train, validation="split:0.1", tokenizer="builtin:bytes"))
    assert "has split:0.1 of web, " in sentence(lambda: compared("one", "two"))
    for name, limit in (("few", 5), ("all", 0)):
        write(runs, name, A, evaluate=Evaluate(every=1, tasks=("agreement",), limit=limit))
        for path in (runs / name).glob("*/metrics.jsonl"):
            path.write_text(path.read_text() + '{"eval/agreement/accuracy": 0.5, "progress/tokens": 409600, "progress/step": 200}\n')
    said = sentence(lambda: compared("few", "all", metric="eval/agreement/accuracy"))
    assert "depends on evaluate.limit: " in said
    for name, fingerprint in (("then", "a" * 64), ("now", "b" * 64), ("again", "a" * 64)):
        write(runs, name, A, fingerprint=fingerprint, optimizer={"lr": 1e-3} if name == "again" else {})
    assert "a file of the data has changed between the runs: " in sentence(lambda: compared("then", "now"))
    assert compared("then", "again").variants[0].effect.mean == 0.0


def test_equal_fingerprints_are_one_text_whatever_its_name(runs: Path) -> None:
    for name, place in (("a", "texts"), ("b", "/somewhere/texts")):
        data = Data(train=f"{place}/t.txt", validation=f"{place}/v.txt", tokenizer="builtin:bpe-300")
        write(runs, name, A, fingerprint="a" * 64, data=data)
    assert compared("a", "b", metric="val/loss").variants[0].effect.mean == 0.0


def test_flops_are_an_axis_and_a_warning(runs: Path) -> None:
    """The larger model is compared where the smaller one ends, with as many FLOPs; its tokens are then fewer."""
    write(runs, "a", A)
    deep = {"num_layers": 8}
    for seed in A:
        write_run(runs, "b", seed, [4.0, 3.0], model=deep)
    ratio = training_flops(example(model=deep).model) / training_flops(example().model)
    comparison = compared("a", "b", at="flops")
    tokens = 200 * TOKENS_PER_STEP
    assert comparison.place == tokens * training_flops(example().model) and comparison.cut == ("b",)
    place = 1 / ratio  # of b's tokens; its rows are at 0.5 and 1
    assert comparison.values["b"][1].final == pytest.approx((4.0 - (place - 0.5) / 0.5) * BITS)
    percent = f"({100 * (ratio - 1):+.2f} %)"
    assert any(warning.endswith(percent) and "FLOPs" in warning for warning in comparison.variants[0].warnings)


def test_flops_that_nothing_counts_are_refused_or_said(runs: Path) -> None:
    write(runs, "a", A)
    write(runs, "ramp", A, schedule={"length_ramp": (32, 32, 100)})
    with pytest.raises(Mistake, match="no formula counts the FLOPs of ramp-"):
        compared("a", "ramp", at="flops")
    write(runs, "gated", A, model={"mlp": "swiglu"})
    assert compared("a", "gated").variants[0].side.first.flops is not None
