"""lm-evaluation-harness on our model at tensor 2, against its own model of transformers on the exported weights."""

import json
from pathlib import Path

import pytest
import torch

from parallel.grid import Grid
from research.cli import evaluate, export
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.evaluation.session import Session
from research.generation.restore import DecoderSpec, restored
from research.tracking.run_folder import RunFolder
from tests.models.helpers.build import ROTARY
from tests.research.evaluation.helpers import harness_tasks
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence

pytest.importorskip("lm_eval")

LONG = "of peace, war and jobs: the health of the people — in budget and union ½, them or us, a nation so divided that it fell once. " * 2
PAIRS = [
    ("the people of the", " union"),
    ("", "jobs, health"),
    ("in peace and ", "in war: jobs"),
    ("war and jobs " * 30, "of the union — ½"),
]
TEXTS = [(untrained.TEXT[:82],), (LONG[:130],), ("union",)]
PROMPTS = [
    ("the people of", {"until": ["\n"], "max_gen_toks": 12}),
    ("war", {"until": [",", "e"], "max_gen_toks": 20, "do_sample": False}),
    (LONG, {"until": [], "max_gen_toks": 9, "temperature": 0.0}),
]
QUESTIONS = [
    {"query": f"the people of the {a}:", "choices": ["jobs", "in peace", "½ of them"], "gold": i % 3}
    for i, a in enumerate(("union", "budget", "war", "health", "them"))
]


def session(folder: RunFolder, tensor: int) -> Session:
    experiment = serialization.load(folder.config)
    tokenizer = load_tokenizer(experiment.data, Path("/"))
    return Session(folder.path, folder.checkpoints / "step_000003", experiment.model, tokenizer, None, tensor, 4)


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def answers(model) -> dict[str, list]:
    return {
        "loglikelihood": model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True),
        "rolling": model.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS), disable_tqdm=True),
        "texts": model.generate_until(requests("generate_until", PROMPTS), disable_tqdm=True),
    }


@torch.no_grad()
def test_log_likelihoods_are_the_dense_module_s(folder, lm_eval_offline):
    """On one rank, by torch's softmax; the flag says whether greedy decoding gives the continuation."""
    from research.evaluation.lm_eval_model import LMEvalModel

    module = restored(DecoderSpec(folder.path, folder.checkpoints / "step_000003"), Grid())
    vocab_size = serialization.load(folder.config).model.vocab_size
    with session(folder, 1) as opened:
        ours, tokenizer = LMEvalModel(opened), opened.tokenizer
        ids, split = tokenizer.encode("war peace"), len(tokenizer.encode("war"))
        likelihoods = module(torch.tensor([ids]))[0, :, :vocab_size].double().log_softmax(-1)
        likeliest = int(likelihoods[-1].argmax())
        ((loglikelihood, flag),) = ours.loglikelihood(requests("loglikelihood", [("war", " peace")]), disable_tqdm=True)
        continuations = [("", ids, [likeliest]), ("", ids, [likeliest - 1])]
        assert [flag for _, flag in ours._loglikelihood_tokens(continuations)] == [True, False]
    assert loglikelihood == pytest.approx(sum(float(likelihoods[at - 1, ids[at]]) for at in range(split, len(ids))), abs=1e-5) and not flag


def test_the_verb_runs_a_local_task(folder, tmp_path, capsys, lm_eval_offline):
    """All three kinds of requests; the results are printed."""
    for name, definition in (("choice_y", harness_tasks.HELLASWAG), ("continue_y", harness_tasks.CONTINUE)):
        harness_tasks.write(tmp_path / "tasks", name, definition, QUESTIONS)
    harness_tasks.write(tmp_path / "tasks", "wikitext_y", harness_tasks.WIKITEXT, [{"page": text} for (text,) in TEXTS])
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    names = ["lm_eval:choice_y", "lm_eval:continue_y", "lm_eval:wikitext_y", f"choice:{tmp_path / 'own.jsonl'}"]
    evaluate.main([str(folder.path), "--tasks", *names, "--lm_eval_tasks", str(tmp_path / "tasks"), "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    choice, texts, pages, own = (row["metrics"] for row in rows)
    assert [row["examples"] for row in rows] == [5, 5, 3, 5]
    assert {name: one["value"] for name, one in choice.items()} == {name: one["value"] for name, one in own.items()}
    assert choice["acc"]["stderr"] == pytest.approx(own["acc"]["stderr"]) and choice["acc"]["higher_is_better"]
    assert texts["exact_match"]["value"] == 0 and pages["word_perplexity"]["value"] > 1


def test_generation_kwargs_of_a_task(lm_eval_offline):
    from research.evaluation.lm_eval_model import generation_settings

    options = {"until": "\n", "max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    settings = generation_settings(options, "<end>")
    assert (settings.max_new_tokens, settings.stops) == (5, ("\n", "<end>"))
    assert (settings.sampling.temperature, settings.sampling.top_p) == (0.7, 0.9)
    assert generation_settings({"temperature": 0.7, "do_sample": False}, "").sampling.greedy
    assert generation_settings({}, "").max_new_tokens == 256
    assert "generation_kwargs num_beams cannot be heeded → leave them out" in sentence(lambda: generation_settings({"num_beams": 4}, ""))


def test_a_text_that_does_not_fit(folder, lm_eval_offline):
    from research.evaluation.lm_eval_model import LMEvalModel

    with session(folder, 1) as opened:
        ours = LMEvalModel(opened)
        message = sentence(lambda: ours.loglikelihood(requests("loglikelihood", [("war", "½" * 40)]), disable_tqdm=True))
        assert "cannot be scored → use 1 to 32 (model.seq_length)" in message
        message = sentence(lambda: ours.generate_until(requests("generate_until", [("war", {"max_gen_toks": 32})])))
        assert "max_gen_toks = 32 leaves no room for a prompt in 32 tokens" in message


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know(folder, tmp_path, lm_eval_offline):
    """The harness reads thousands of its own files to find out."""
    message = sentence(lambda: evaluate.main([str(folder.path), "--tasks", "lm_eval:zzz", "--lm_eval_tasks", str(tmp_path)]))
    assert "lm-evaluation-harness has no task 'zzz'" in message


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_it_is_the_harness_on_transformers(positions, tmp_path, lm_eval_offline, capsys):
    """The same log-likelihoods to 1e-4, greedy flags and texts: two tensor ranks of ours, HFLM on the exported folder."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from research.evaluation.lm_eval_model import LMEvalModel

    llama = dict(norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=False, tied=False, **ROTARY)
    # As many rows as the tokenizer has tokens: we never generate an id without text, the harness' generate does.
    folder = untrained.make(tmp_path, vocab_size=305, **(llama if positions == "rotary" else {}))
    export.main([str(folder.path), str(tmp_path / "hf")])
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4, logits_cache=False)
    with session(folder, 2) as opened:
        expected, found = answers(theirs), answers(LMEvalModel(opened))
    assert [flag for _, flag in found["loglikelihood"]] == [flag for _, flag in expected["loglikelihood"]]
    assert [one for one, _ in found["loglikelihood"]] == pytest.approx([one for one, _ in expected["loglikelihood"]], abs=1e-4)
    assert found["rolling"] == pytest.approx(expected["rolling"], rel=1e-6)
    assert found["texts"] == expected["texts"] and all(found["texts"])
