"""Errors' helpers: a suggestion is made where a name is near, and only there; lists in English."""

import pytest

from parallel.errors import listed, nearest

VERBS = ["runs", "generate", "evaluate", "serve", "export", "import", "verify", "inspect", "replay", "supervise", "torture"]
FIELDS = [
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n", "stop", "stream"),
    *("stream_options", "messages", "max_completion_tokens", "logprobs", "top_logprobs", "include_usage"),
]
OPTIONS = ["--checkpoint", "--chat_template", "--port", "--host", "--token_file", "--tensor", "--slots", "--context", "--max_new_tokens"]
SETTINGS = [
    *("model", "model.num_heads", "model.num_layers", "model.seq_length", "optimizer", "optimizer.lr", "optimizer.eps", "optimizer.decay"),
    *("schedule.steps", "data.train", "data.tokenizer", "--dry-run"),
]
CORPORA = ["builtin:state_of_the_union/train", "builtin:state_of_the_union/val"]


@pytest.mark.parametrize(
    ("candidates", "near"),
    [
        (VERBS, {"rnus": "runs", "genrate": "generate", "eval": "evaluate", "gen": "generate", "inport": "import", "run": "runs"}),
        (FIELDS, {"temprature": "temperature", "topk": "top_k", "usage": "include_usage", "max_new_tokens": "max_tokens"}),
        (FIELDS, {"stops": "stop", "rep_penalty": "repetition_penalty", "temp": "temperature", "maxTokens": "max_tokens"}),
        (OPTIONS, {"--token": "--token_file", "--prot": "--port", "--max-tokens": "--max_new_tokens"}),
        (SETTINGS, {"lr": "optimizer.lr", "modle.num_heads": "model.num_heads", "model.num_head": "model.num_heads"}),
        (SETTINGS, {"n_heads": "model.num_heads", "model.num_layers.x": "model.num_layers", "dryrun": "--dry-run", "modell": "model"}),
        (CORPORA, {"builtin:state_of_union/val": "builtin:state_of_the_union/val"}),
    ],
)
def test_a_slip_is_guessed(candidates, near):
    assert {name: nearest(name, candidates) for name in near} == near


@pytest.mark.parametrize(
    ("candidates", "names"),
    [
        (VERBS, "plan --version version train chat test list sample resume convert launch status logs delete doctor init x"),
        (FIELDS, "ignore_eos best_of suffix typical_p skip_special_tokens length_penalty use_beam_search guided_json mirostat system"),
        (OPTIONS, "--model --batch --device --api_key --workers --tp"),
        (SETTINGS, "optimizer.xyz model.window data.foo schedule.epochs momentum"),
        (CORPORA, "builtin:wikitext/train builtin:shakespeare"),
    ],
)
def test_an_unlike_word_is_no_guess(candidates, names):
    assert {name: nearest(name, candidates) for name in names.split()} == dict.fromkeys(names.split())


def test_lists_in_english():
    assert [listed(range(count)) for count in range(4)] == ["", "0", "0 or 1", "0, 1 or 2"] and listed("ab", "and") == "a and b"
