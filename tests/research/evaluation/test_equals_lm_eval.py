"""Our tasks give the metrics of lm-evaluation-harness' own tasks on the same file, tokenizer and (made-up) log-probabilities."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy
import pytest

from research.data.tokenizer import Tokenizer
from research.evaluation import registry
from research.evaluation.task import Metric, Settings, TaskContext, evaluate
from tests.research.evaluation.conftest import shared
from tests.research.evaluation.helpers import harness_tasks
from tests.research.evaluation.helpers.fake import Bigram, logprob

WORDS = ["the", "people", "union", "peace", "war", "jobs", "health", "budget", "½", "nation"]
PAGES = [
    " = The Union = \n \n The people 's peace @-@ time jobs , 1 @,@ 000 ( of them ) ; it cost 3 @.@ 5 . \n ",
    ' = War = \n \n " Peace " , he said : [ no ] war ! \n \n = = Budget = = \n \n Health and jobs ? N 5 ° . \n',
]


@pytest.fixture(scope="module")
def context(context: TaskContext) -> TaskContext:
    """With room for a question, which is many tokens of a tokenizer that knows few words."""
    return dataclasses.replace(context, length=129)


@pytest.fixture(scope="module")
def harness(tmp_path_factory, context: TaskContext, lm_eval_offline):
    """name, definition, rows -> the harness' own metrics of that task and their standard errors, by name."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from research.evaluation.lm_eval_model import LMEvalModel

    folder = tmp_path_factory.mktemp("harness")

    def metrics_of(name, definition, rows):
        harness_tasks.write(folder, name, definition, rows)
        session = SimpleNamespace(length=context.length, tokenizer=context.tokenizer, scorer=Bigram(context.length))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        results = simple_evaluate(LMEvalModel(session), tasks=[name], task_manager=manager, bootstrap_iters=100, log_samples=False)
        return {key.removesuffix(",none"): value for key, value in results["results"][name].items()}

    return metrics_of


def ours(name: str, context: TaskContext, settings: Settings | None = None) -> dict[str, Metric]:
    (task,) = registry.create_tasks([name], settings)
    return {metric.name: metric for metric in evaluate(task.requests(context), Bigram(context.length))}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def passages(count: int) -> list[dict[str, str]]:
    """Shorter and longer than the scorer takes, with last words of one token and of several."""
    return [{"text": " ".join([*(WORDS[(i * k + k * k) % 10] for k in range(1 + 3 * i % 100)), WORDS[i % 7 + 3]])} for i in range(count)]


def test_lambada(tmp_path, context, harness):
    theirs = harness("lambada_x", harness_tasks.LAMBADA, passages(40))
    metrics = ours(f"lambada:{jsonl(tmp_path / 'l.jsonl', passages(40))}", context)
    assert metrics["accuracy"].value == theirs["acc"] and 0 < theirs["acc"] < 1
    assert metrics["accuracy"].stderr == pytest.approx(theirs["acc_stderr"], rel=1e-9)
    assert metrics["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-9)
    nats = [-last_word(context.tokenizer, row["text"]) for row in passages(40)]
    assert metrics["perplexity"].stderr == pytest.approx(numpy.exp(numpy.mean(nats)) * numpy.std(nats, ddof=1) / 40**0.5, rel=1e-9)
    # The harness bootstraps this standard error from exponentials of means, which agrees only if the mean is known well. Here it is not.


def last_word(tokenizer: Tokenizer, text: str) -> float:
    """The log-probability of the last word, from the tokens of the whole passage and those of everything before the word."""
    ids, before = tokenizer.encode(text), tokenizer.encode(text.rpartition(" ")[0])
    return math.fsum(map(logprob, ids[len(before) - 1 :], ids[len(before) :]))


def test_lambada_as_it_is(context, harness):
    path = shared("lambada/test.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    theirs = harness("lambada_real", harness_tasks.LAMBADA, rows)
    metrics = ours(f"lambada:{path}", context, Settings(limit=200))
    assert metrics["accuracy"].value == theirs["acc"] and metrics["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-9)


def test_minimal_pairs(context, harness):
    path = registry.BUILTIN / "agreement.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    theirs, metrics = harness("blimp_x", harness_tasks.BLIMP, rows), ours("agreement", context)
    assert metrics["accuracy"].value == theirs["acc"] and 0 < theirs["acc"] < 1
    assert metrics["accuracy"].stderr == pytest.approx(theirs["acc_stderr"], rel=1e-9)
    parts = [len([row for row in rows if row["UID"] == name.partition("/")[2]]) for name in metrics]
    assert sum(parts) == len(rows)
    assert sum(one.value * n for one, n in zip(metrics.values(), parts, strict=True)) == pytest.approx(theirs["acc"] * len(rows))


def test_multiple_choice(tmp_path, context, harness):
    path = registry.BUILTIN / "government.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] + [
        {"query": "Peace ", "choices": ["½½½½", "the people", "war and jobs"], "gold": 1}  # bytes are not characters, a space at the end
    ]
    theirs, metrics = harness("choice_x", harness_tasks.HELLASWAG, rows), ours(f"choice:{jsonl(tmp_path / 'c.jsonl', rows)}", context)
    assert {name: one.value for name, one in metrics.items()} == {name: theirs[name] for name in ("acc", "acc_norm", "acc_bytes")}
    assert {name: one.stderr for name, one in metrics.items()} == pytest.approx(
        {name: theirs[f"{name}_stderr"] for name in metrics}, rel=1e-9
    )
    assert len({one.value for one in metrics.values()}) > 1


def test_wikitext(tmp_path, context, harness):
    text = "\n".join(PAGES)
    (tmp_path / "w.txt").write_text(text, encoding="utf-8")
    theirs = harness("wikitext_x", harness_tasks.WIKITEXT, [{"page": page} for page in PAGES])
    metrics = ours(f"wikitext:{tmp_path / 'w.txt'}", context)
    assert {name: one.value for name, one in metrics.items()} == pytest.approx({name: theirs[name] for name in metrics}, rel=1e-9)
    assert set(metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


def test_wikitext_as_it_is(context, harness):
    """The first articles, split at the headings."""
    from research.evaluation.wikitext import pages

    path = shared("wikitext2/test.txt")
    theirs = harness("wikitext_real", harness_tasks.WIKITEXT, [{"page": page} for page in pages(path.read_text("utf-8"))[:5]])
    metrics = ours(f"wikitext:{path}", context, Settings(limit=5))
    assert {name: one.value for name, one in metrics.items()} == pytest.approx({name: theirs[name] for name in metrics}, rel=1e-9)


def test_the_prose_is_the_harness_prose():
    module = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    from research.evaluation.wikitext import detokenize

    texts = [*PAGES, "a /' 7/ b", "= = = = x = = = =", "the states ' rights", "{ a } ' b ' c's 's"]
    for text in texts:
        expected = module.wikitext_detokenizer({"page": text})
        assert detokenize(text) == expected, text
    whole = shared("wikitext2/test.txt").read_text("utf-8")
    assert detokenize(whole) == module.wikitext_detokenizer({"page": whole})


def test_megatron_s_count(tmp_path, context):
    """Its zero-shot evaluation: e^(loss per token · (tokens − 1) / (words − 1)), words separated by single spaces of the original text."""
    from research.evaluation.wikitext import detokenize

    text = "\n".join(PAGES) * 3
    (tmp_path / "w.txt").write_text(text, encoding="utf-8")
    ids = context.tokenizer.encode(detokenize(text))
    nats = -math.fsum(map(logprob, ids, ids[1:]))
    words = len(text.strip().split(" "))
    metrics = ours(f"wikitext_megatron:{tmp_path / 'w.txt'}", context, Settings(stride=8))
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1) * (len(ids) - 1) / (words - 1)), rel=1e-12)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-12)
