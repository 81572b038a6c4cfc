"""Runs that were trained on pairs read prompts as sources: `generate`, `evaluate --tasks translation` and the server write the same."""

import json

import pytest
import torch

from parallel.checkpoint.folder import latest
from parallel.grid import Grid
from research.__main__ import main
from research.config import Pairs, serialization
from research.data import tokenizer
from research.data.run_tokenizer import load_tokenizer
from research.generation.restore import DecoderSpec, model_of, restored
from research.generation.sources import SourceForm, source_form
from tests.research.helpers.example import t5
from tests.research.helpers.small_runs import Stage

pytestmark = pytest.mark.slow  # quick ones of the parts: test_translation.py, models/inference/test_encoder_decoder.py
SOURCES = ("tne", "and the", "a")
TOKENS = 8


@pytest.fixture(scope="module", params=["translate_en_de", "translate_en_de_decoder"])
def run(request, tmp_path_factory):
    """A small run that has learned a little of writing words backwards."""
    stage = Stage(tmp_path_factory.mktemp(request.param), request.param)
    ended = stage.run("run", schedule={"steps": 40, "batch_size": 16}, model={"residual_dropout": 0.0}, checkpoints={"every": 0})
    assert ended.codes == [0], ended.said
    rows = [json.loads(line) for line in ended.folder.samples.read_text().splitlines()]
    assert len(rows) == 1 and "<sep>" not in rows[0]["prompt"]
    return ended.folder


def greedy(run, text: str) -> list[int]:
    """The likeliest tokens, each from a pass over everything before it, without a cache."""
    experiment = serialization.load(run.config)
    words, model = load_tokenizer(experiment.data, run.path), model_of(run.path)
    form = source_form(experiment, words)
    module = restored(DecoderSpec(run.path, latest(run.checkpoints)), Grid())
    source, found = list(form.ids(words, text)), []
    with torch.no_grad():
        for _ in range(TOKENS):
            if form.start is None:
                logits = module(torch.tensor([source + found]))[0, -1]
            else:
                padding = [0] * (model.source_length - len(source))
                target = [form.start, *found] + [0] * (model.seq_length - len(found) - 1)
                segments = [0] * len(source) + [-1] * len(padding) + [0] * (len(found) + 1) + [-1] * (model.seq_length - len(found) - 1)
                logits = module((torch.tensor([source + padding + target]), torch.tensor([segments])))[0, len(found)]
            found.append(int(logits[: words.vocab_size].argmax()))
            if found[-1] == words.end_of_text:
                break
    return found


def written(run, capsys, *options: str) -> list[dict]:
    prompts = [word for source in SOURCES for word in ("--prompt", source)]
    assert main(["generate", str(run.path), *prompts, "--max_new_tokens", str(TOKENS), "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_generated_is_what_whole_passes_say(run, capsys) -> None:
    assert [row["ids"] for row in written(run, capsys)] == [greedy(run, source) for source in SOURCES]


def test_tensor_ranks_and_beams_write_the_same(run, capsys) -> None:
    for options in ((), ("--beams", "3", "--n", "2"), ("--temperature", "1", "--repetition_penalty", "1.2")):
        alone, sliced = written(run, capsys, *options), written(run, capsys, *options, "--tensor", "2")
        assert [row["ids"] for row in alone] == [row["ids"] for row in sliced], options


def test_a_prompt_is_not_printed_in_front_of_its_target(run, capsys) -> None:
    assert main(["generate", str(run.path), "--prompt", SOURCES[0], "--max_new_tokens", "3"]) == 0
    assert SOURCES[0] not in capsys.readouterr().out.splitlines()[0]


def test_translation_is_evaluated_and_kept(run, capsys, tmp_path) -> None:
    pytest.importorskip("sacrebleu")
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"source": word, "target": word[::-1]}) + "\n" for word in SOURCES))
    assert main(["evaluate", str(run.path), "--tasks", f"translation:{file}", "--beams", "2", "--json"]) == 0
    metrics = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "dictionary/bleu" in json.dumps(metrics)
    kept = list((run.path / "evaluations" / "translations").glob("*.jsonl"))
    assert [json.loads(line)["source"] for line in kept[0].read_text().splitlines()] == list(SOURCES)


def test_a_source_that_is_too_long_is_one_sentence(run, capsys) -> None:
    assert main(["generate", str(run.path), "--prompt", "the people " * 30]) == 2
    said = capsys.readouterr().err
    has_encoder = model_of(run.path).kind == "t5"
    assert ("is longer than model.source_length = 16 → shorten it" if has_encoder else "→ shorten the prompt") in said


def test_scoring_tasks_are_for_models_that_continue_texts(run, capsys) -> None:
    if model_of(run.path).kind == "t5":
        assert main(["evaluate", str(run.path)]) == 2
        assert "validation is for models that continue texts, and " in capsys.readouterr().err


def test_a_target_begins_with_the_start_token_of_the_model() -> None:
    """Without pairs: their separator is what a decoder of theirs has learned to begin with."""
    words = tokenizer.fixed("builtin:bytes+sep")
    separator = words.backend.token_to_id("<sep>")
    for start, expected in ((None, words.end_of_text), (0, 0)):
        model = {"start_token": start}
        assert source_form(t5(model=model), words) == SourceForm(words.end_of_text, expected)
        of_pairs = t5(model=model)
        of_pairs = of_pairs.model_copy(update={"data": of_pairs.data.model_copy(update={"examples": Pairs()})})
        assert source_form(of_pairs, words) == SourceForm(separator, separator)
