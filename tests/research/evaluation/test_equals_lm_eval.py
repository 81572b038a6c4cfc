"""Our tasks' figures are those of lm-evaluation-harness' own tasks on the same file, tokenizer and (made up) log-probabilities."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest

from research.data.tokenizer import Tokenizer
from research.evaluation import lm_eval_task, registry
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
def given(given: TaskContext) -> TaskContext:
    """With room for a question: the tokenizer knows few words."""
    return dataclasses.replace(given, length=129)


@pytest.fixture(scope="module")
def harness(tmp_path_factory, given: TaskContext):
    """name, definition, rows -> the harness' own figures of that task, and their standard errors, by metric."""
    pytest.importorskip("lm_eval")
    with mock.patch.dict(os.environ):
        lm_eval_task.keep_offline(tmp_path_factory.mktemp("cache"))
        yield asking(tmp_path_factory.mktemp("harness"), given)


def asking(place, given: TaskContext):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from research.evaluation.lm_eval_model import OurModel

    def figures(name, definition, rows, limit=None):
        harness_tasks.write(place, name, definition, rows)
        model = OurModel(SimpleNamespace(length=given.length, tokenizer=given.tokenizer, scorer=Bigram(given.length)))
        manager = TaskManager(include_path=str(place), include_defaults=False)
        told = simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=100, log_samples=False, limit=limit)
        return {key.removesuffix(",none"): value for key, value in told["results"][name].items()}

    return figures


def ours(name: str, given: TaskContext, settings: Settings | None = None) -> dict[str, Metric]:
    (task,) = registry.named([name], settings)
    return {metric.name: metric for metric in evaluate(task.exam(given), Bigram(given.length))}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def passages(count: int) -> list[dict[str, str]]:
    """Of lengths below and above what the scorer takes, with last words of one token and of several."""
    return [{"text": " ".join([*(WORDS[(i * k + k * k) % 10] for k in range(1 + 3 * i % 100)), WORDS[i % 7 + 3]])} for i in range(count)]


def test_lambada(tmp_path, given, harness):
    theirs, found = (
        harness("lambada_x", harness_tasks.LAMBADA, passages(40)),
        ours(f"lambada:{jsonl(tmp_path / 'l.jsonl', passages(40))}", given),
    )
    assert found["accuracy"].value == theirs["acc"] and 0 < theirs["acc"] < 1
    assert found["accuracy"].stderr == pytest.approx(theirs["acc_stderr"], rel=1e-9)
    assert found["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-9)
    nats = [-last_word(given.tokenizer, row["text"]) for row in passages(40)]
    assert found["perplexity"].stderr == pytest.approx(numpy.exp(numpy.mean(nats)) * numpy.std(nats, ddof=1) / 40**0.5, rel=1e-9)
    # The harness draws its own, from exponentials of means; the two agree where the mean is known well, and here it is not.


def last_word(tokenizer: Tokenizer, text: str) -> float:
    """Its log-probability, from the tokens of the whole passage and of all before it."""
    ids, before = tokenizer.encode(text), tokenizer.encode(text.rpartition(" ")[0])
    return math.fsum(map(logprob, ids[len(before) - 1 :], ids[len(before) :]))


def test_lambada_as_it_is(given, harness):
    path = shared("lambada/test.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    theirs = harness("lambada_real", harness_tasks.LAMBADA, rows)
    found = ours(f"lambada:{path}", given, Settings(limit=200))
    assert found["accuracy"].value == theirs["acc"] and found["perplexity"].value == pytest.approx(theirs["perplexity"], rel=1e-9)


def test_minimal_pairs(given, harness):
    path = registry.BUILTIN / "agreement.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    theirs, found = harness("blimp_x", harness_tasks.BLIMP, rows), ours("agreement", given)
    assert found["accuracy"].value == theirs["acc"] and 0 < theirs["acc"] < 1
    assert found["accuracy"].stderr == pytest.approx(theirs["acc_stderr"], rel=1e-9)
    parts = [len([row for row in rows if row["UID"] == name.partition("/")[2]]) for name in found]
    assert sum(parts) == len(rows)
    assert sum(one.value * n for one, n in zip(found.values(), parts, strict=True)) == pytest.approx(theirs["acc"] * len(rows))


def test_multiple_choice(tmp_path, given, harness):
    path = registry.BUILTIN / "government.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] + [
        {"query": "Peace ", "choices": ["½½½½", "the people", "war and jobs"], "gold": 1}  # bytes are not characters, a space at the end
    ]
    theirs, found = harness("choice_x", harness_tasks.HELLASWAG, rows), ours(f"choice:{jsonl(tmp_path / 'c.jsonl', rows)}", given)
    assert {name: one.value for name, one in found.items()} == {name: theirs[name] for name in ("acc", "acc_norm", "acc_bytes")}
    assert {name: one.stderr for name, one in found.items()} == pytest.approx({name: theirs[f"{name}_stderr"] for name in found}, rel=1e-9)
    assert len({one.value for one in found.values()}) > 1


def test_wikitext(tmp_path, given, harness):
    text = "\n".join(PAGES)
    (tmp_path / "w.txt").write_text(text, encoding="utf-8")
    theirs = harness("wikitext_x", harness_tasks.WIKITEXT, [{"page": page} for page in PAGES])
    found = ours(f"wikitext:{tmp_path / 'w.txt'}", given)
    assert {name: one.value for name, one in found.items()} == pytest.approx({name: theirs[name] for name in found}, rel=1e-9)
    assert set(found) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


def test_wikitext_as_it_is(given, harness):
    """Its first articles, cut at the headings."""
    from research.evaluation.wikitext import pages

    path = shared("wikitext2/test.txt")
    theirs = harness("wikitext_real", harness_tasks.WIKITEXT, [{"page": page} for page in pages(path.read_text("utf-8"))[:5]])
    found = ours(f"wikitext:{path}", given, Settings(limit=5))
    assert {name: one.value for name, one in found.items()} == pytest.approx({name: theirs[name] for name in found}, rel=1e-9)


def test_the_prose_is_the_harness_prose():
    module = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    from research.evaluation.wikitext import detokenize

    texts = [*PAGES, "a /' 7/ b", "= = = = x = = = =", "the states ' rights", "{ a } ' b ' c's 's"]
    for text in texts:
        expected = module.wikitext_detokenizer({"page": text})
        assert detokenize(text) == expected, text
    whole = shared("wikitext2/test.txt").read_text("utf-8")
    assert detokenize(whole) == module.wikitext_detokenizer({"page": whole})


def test_megatron_s_count(tmp_path, given):
    """Its zero-shot evaluation: e^(loss a token · (tokens − 1) / (words − 1)), words by single spaces of the text as it is."""
    from research.evaluation.wikitext import detokenize

    text = "\n".join(PAGES) * 3
    (tmp_path / "w.txt").write_text(text, encoding="utf-8")
    ids = given.tokenizer.encode(detokenize(text))
    nats = -math.fsum(map(logprob, ids, ids[1:]))
    words = len(text.strip().split(" "))
    found = ours(f"wikitext_megatron:{tmp_path / 'w.txt'}", given, Settings(stride=8))
    assert found["word_perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1) * (len(ids) - 1) / (words - 1)), rel=1e-12)
    assert found["perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-12)
