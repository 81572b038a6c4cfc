"""Tasks by name, errors in their files, and the batches in which their requests are scored."""

import dataclasses
import json
import subprocess
import sys

import pytest

from research.evaluation import registry
from research.evaluation.examples import context_and_continuation, continuation
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Settings, Stopped, TaskContext, evaluate
from tests.research.evaluation.helpers import agreement
from tests.research.evaluation.helpers.fake import Bigram
from tests.research.helpers.example import sentence
from tests.research.helpers.launches import ROOT

PAIR = {"sentence_good": "the people", "sentence_bad": "the war"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lambda", "there is no task 'lambda' → did you mean lambada?"),
        (
            "zzz",
            "→ use validation, perplexity, agreement, government, wikitext, wikitext_megatron, lambada, pairs, choice, python_bodies, ",
        ),
        ("pairs", "task 'pairs' needs a file → write pairs:FILE.jsonl"),
        ("pairs:", "there is no task 'pairs:' → did you mean pairs?"),
        ("pairs:no.jsonl", "pairs:no.jsonl: no.jsonl does not exist → name a .jsonl file"),
        ("choice:file.txt", "choice:file.txt: file.txt is not a kind of file that this task reads → use .jsonl"),
        ("perplexity:no.txt", "perplexity:no.txt = 'no.txt': no.txt does not exist"),
        (
            "wikitext",
            "task 'wikitext' needs a file that does not come with Tessera → get WikiText-2 (Hugging Face data set Salesforce/wikitext",
        ),
        ("lambada", "then write lambada:FILE or --data FOLDER with lambada/test.jsonl in it"),
    ],
)
def test_names_that_name_nothing(name, message):
    assert message in sentence(lambda: registry.create_tasks([name]))


def test_a_folder_without_the_file_says_how_to_get_it(tmp_path):
    message = sentence(lambda: registry.create_tasks(["lambada"], Settings(data=tmp_path)))
    assert f"{tmp_path}/lambada/test.jsonl does not exist → get LAMBADA's test split" in message and "put it there" in message


def test_each_task_once_in_order():
    assert [task.name for task in registry.create_tasks(["agreement", "validation", "agreement"])] == ["agreement", "validation"]


def test_every_task_is_described():
    assert {name.partition(":")[0] for name, _ in registry.descriptions()} == {registry.VALIDATION, registry.TEXT, *registry.KINDS}


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("pairs", "{", "line 2 is not JSON"),
        ("pairs", "1" * 5000, "line 2 is not JSON"),
        ("pairs", '{"sentence_good": "a", "sentence_bad": "a\\ud800"}', "line 2 has half a surrogate pair at character 1"),
        ("choice", '{"query": "a", "choices": ["b", "\\udfff"], "gold": 0}', "line 2 has half a surrogate pair at character 0"),
        ("pairs", "[1]", "line 2 is not an object"),
        ("pairs", '{"sentence_good": "a"}', 'line 2 has no "sentence_bad" that is a text → write lines such as {"sentence_good"'),
        (
            "pairs",
            json.dumps(PAIR | {"sentence_good": "½" * 300}),
            "line 2: 300 tokens are to be scored, the model takes 32 → shorten the text",
        ),
        ("choice", '{"query": "a", "choices": ["b"], "gold": 0}', "line 2 has not two or more choices"),
        ("choice", '{"query": "a", "choices": ["b", ""], "gold": 0}', "line 2 has not two or more choices, texts that are not empty"),
        ("choice", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2 has gold = 2, but choices 0 to 1"),
        ("choice", '{"query": "a", "choices": ["b", "c"], "gold": true}', 'line 2 has no "gold" that is a whole number'),
        ("lambada", '{"text": "word"}', "line 2 has no last word after a space"),
        ("lambada", '{"text": "a word "}', "line 2 has no last word after a space"),
    ],
)
def test_lines_that_are_not_right(tmp_path, context, kind, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    (task,) = registry.create_tasks([f"{kind}:{path}"])
    assert message in sentence(lambda: task.requests(context))


FILES = {
    "pairs": ("x.jsonl", json.dumps(PAIR)),
    "choice": ("x.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 1}'),
    "lambada": ("x.jsonl", '{"text": "the people of the union"}'),
    "wikitext": ("x.txt", " = Heading = \n \n the people , of the union . \n"),
    "wikitext_megatron": ("x.txt", " = Heading = \n \n the people , of the union . \n"),
    "perplexity": ("x.txt", "the people of the union\n"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_byte_order_mark_is_no_part_of_a_task(tmp_path, context, kind):
    name, content = FILES[kind]
    found = []
    for codec in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, encoding=codec)
        (task,) = registry.create_tasks([f"{kind}:{tmp_path / name}"])
        requests = task.requests(context)
        scores = [Score((-1.0,) * request.scored, (True,) * request.scored) for request in requests.requests]
        found.append((requests.requests, requests.metrics(scores)))
    assert found[0] == found[1]


def test_a_file_without_examples(tmp_path, context):
    (tmp_path / "x.jsonl").write_text("\n\n")
    (task,) = registry.create_tasks([f"pairs:{tmp_path / 'x.jsonl'}"])
    assert "has no examples → write lines such as" in sentence(lambda: task.requests(context))


def test_a_limit_takes_the_first(tmp_path, context):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n" * 3 + "{broken", encoding="utf-8")
    (task,) = registry.create_tasks([f"pairs:{path}"], Settings(limit=3))
    assert task.requests(context).examples == 3 and len(task.requests(context).requests) == 6


def test_the_digest_is_the_files(tmp_path, context):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(PAIR), encoding="utf-8")
    (task,) = registry.create_tasks([f"pairs:{path}"])
    before = task.digest(context)
    assert before == subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    path.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    assert task.digest(context) != before


def test_contexts_end_before_white_space(context: TaskContext):
    tokenizer = context.tokenizer
    for text, following in (("the people ", "of"), ("the people", " of"), ("the\n", "war")):
        before, after = context_and_continuation(tokenizer, text, following)
        assert tokenizer.decode(before) == text.rstrip() and tokenizer.decode(before + after) == text + following
    assert context_and_continuation(tokenizer, "", "war")[0] == [tokenizer.end_of_text]


def test_a_long_context_keeps_its_end(context: TaskContext):
    request = continuation(context.tokenizer, "the people of the union " * 30, "war", 33)
    assert len(request.ids) == 33 and context.tokenizer.decode(request.ids[-request.scored :]) == " war"


def test_batches_are_scored_in_order_and_can_be_stopped(context):
    (task,) = registry.create_tasks(["agreement"], Settings(limit=5))
    requests = task.requests(dataclasses.replace(context, length=129))
    whole, batched, progress = Bigram(129), Bigram(129), []
    assert evaluate(requests, batched, progress.append, batch_size=3) == evaluate(requests, whole)
    assert whole.calls == [10] and batched.calls == progress == [3, 3, 3, 1]
    answers = iter([True, False])
    with pytest.raises(Stopped):
        evaluate(requests, Bigram(129), should_continue=lambda: next(answers), batch_size=3)


def test_the_pairs_that_ship_are_what_the_rules_make():
    assert (registry.BUILTIN / "agreement.jsonl").read_text("utf-8") == agreement.lines()
    for _, good, bad in agreement.pairs():
        assert good != bad and sum(a != b for a, b in zip(good.split(), bad.split(), strict=True)) == 1


def test_the_questions_that_ship_have_no_favourite_place():
    golds = [json.loads(line)["gold"] for line in (registry.BUILTIN / "government.jsonl").read_text("utf-8").splitlines()]
    assert max(map(golds.count, range(4))) - min(map(golds.count, range(4))) <= 1


def test_requests_that_cannot_be():
    for ids, scored in (((1,), 1), ((1, 2), 2), ((1, 2), 0)):
        with pytest.raises(ValueError, match="cannot be scored"):
            ScoreRequest(ids, scored)


def test_tasks_know_of_no_torch():
    code = "import sys, research.evaluation.registry, research.cli.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
