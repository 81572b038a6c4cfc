"""The verb generate: streamed texts, several texts, JSON lines, interactive sessions, two tensor ranks."""

import io
import json
import os
import signal
import sys

import pytest

from research import __main__ as research_main
from research.cli import generate as generate_file
from research.data.run_tokenizer import load_tokenizer
from research.tracking.run_folder import RunFolder
from tests.models.helpers.decoding import logits_of
from tests.research.helpers import untrained

DRAWN = ["--temperature", "1", "--seed", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("generate"), num_kv_heads=2)


@pytest.fixture
def generate(folder, capfd):
    """Runs the verb in this process; returns its standard output, or its standard error if the exit code is not 0."""

    def run(*words: str, code: int = 0) -> str:
        assert research_main.main(["generate", str(folder.path), *words]) == code
        captured = capfd.readouterr()
        assert captured.err == "" or code
        return captured.out if code == 0 else captured.err

    return run


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_text_is_streamed_after_its_prompt(generate):
    (row,) = rows(generate("--prompt", "the people", "--max_new_tokens", "12", "--json"))
    assert generate("--prompt", "the people", "--max_new_tokens", "12") == "the people" + row["text"] + "\n"
    assert row["finish"] == "length" and len(row["ids"]) == 12


def test_pieces_are_printed_as_they_are_generated(generate, monkeypatch):
    pieces = []
    monkeypatch.setattr(generate_file, "_put", pieces.append)
    generate("--prompt", "the people", "--max_new_tokens", "12")
    assert pieces[0] == "the people" and pieces[-1] == "\n" and len(pieces) == 14


def test_a_text_does_not_depend_on_the_batch(generate):
    """With any --n and --batch, the seed, the prompt number and the text number determine the text."""
    prompts = ["--prompt", "war", "--prompt", "the people of", "--prompt", "jobs"]
    crowded = rows(generate(*prompts, *DRAWN, "--n", "3", "--batch", "9", "--max_new_tokens", "10", "--json"))
    narrow = rows(generate(*prompts, *DRAWN, "--n", "3", "--batch", "1", "--max_new_tokens", "10", "--json"))
    assert crowded == narrow and len({tuple(row["ids"]) for row in crowded}) == 9
    assert [row["prompt"] for row in crowded[::3]] == prompts[1::2]
    (first,) = rows(generate("--prompt", "war", *DRAWN, "--max_new_tokens", "10", "--json"))
    assert first == crowded[0]
    (other,) = rows(generate("--prompt", "war", *DRAWN[:-1], "5", "--max_new_tokens", "10", "--json"))
    assert other["ids"] != first["ids"]


def test_several_texts_are_blocks(generate):
    out = generate("--prompt", "war", "--prompt", "peace", "--max_new_tokens", "5", "--logprobs", "1")
    found = rows(generate("--prompt", "war", "--prompt", "peace", "--max_new_tokens", "5", "--logprobs", "1", "--json"))
    for row in found:
        assert row["prompt"] + row["text"] + "\n" in out
        for token in row["logprobs"]:
            assert f"{token['logprob']:9.3f}  " in out
    assert out.startswith("war") and "\n\npeace" in out


def test_a_file_becomes_json_lines_in_its_order(generate, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "war"}\n{"prompt": "the people of the union"}\n{"prompt": ""}\n')
    found = rows(generate("--file", str(path), "--max_new_tokens", "7"))
    assert [row["prompt"] for row in found] == ["war", "the people of the union", ""]
    assert all(len(row["ids"]) == 7 or row["finish"] == "end_of_text" for row in found)
    (alone,) = rows(generate("--prompt", "the people of the union", "--max_new_tokens", "7", "--json"))
    assert alone == found[1]


def test_beams(generate):
    found = rows(generate("--prompt", "war", "--beams", "4", "--n", "3", "--max_new_tokens", "6", "--json"))
    assert len(found) == 3 and [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert "war" + found[0]["text"] in generate("--prompt", "war", "--beams", "4", "--max_new_tokens", "6")


WINDOW = """from tests.models.helpers import undecodable

class WindowBlock(undecodable.WindowBlock):
    pass
"""


def test_sliding_window_attention_is_generated_as_whole_passes_compute_it(tmp_path, capfd):
    """Greedy tokens are those of one pass per token; one line says that there is no cache, and why."""
    from parallel.grid import Grid
    from research.config import serialization
    from research.generation.restore import DecoderSpec, restored

    run = untrained.make(tmp_path, variant=WINDOW, residual="variant:WindowBlock", tied=False)
    assert research_main.main(["generate", str(run.path), "--prompt", "the people", "--max_new_tokens", "20", "--json"]) == 0
    captured = capfd.readouterr()
    (row,) = rows(captured.out)
    module, model = restored(DecoderSpec(run.path, run.checkpoints / "step_000003"), Grid()), serialization.load(run.config).model
    tokenizer = load_tokenizer(serialization.load(run.config).data, tmp_path)
    ids = list(tokenizer.prompt("the people"))
    for token in row["ids"]:
        assert int(logits_of(module, model, ids)[: tokenizer.vocab_size].argmax()) == token
        ids.append(token)
    assert len(set(row["ids"])) > 5 and captured.err.count("\n") == 1
    assert captured.err.startswith(
        "warn   no KV cache, so each token costs a pass over the whole text: classes of variant.py compute other"
    )


def test_an_interactive_session_continues_after_a_mistake(generate, folder, monkeypatch, capfd):
    lines = f"war\n{'long ' * 60}\npeace\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert research_main.main(["generate", str(folder.path), "--interactive", "--max_new_tokens", "5"]) == 0
    captured = capfd.readouterr()
    assert captured.err.startswith("error  a prompt of ") and captured.err.count("\n") == 1
    first, last = (generate("--prompt", prompt, "--max_new_tokens", "5") for prompt in ("war", "peace"))
    assert captured.out == first + last


def test_an_interactive_session_in_a_pipe_reads_text_as_a_file_is_read(generate, folder, monkeypatch, capfd):
    """Without a byte-order mark and carriage returns; a line that is not UTF-8 is reported, and the next is read."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfwar\r\n\xff\npeace")))
    assert research_main.main(["generate", str(folder.path), "--interactive", "--max_new_tokens", "5"]) == 0
    captured = capfd.readouterr()
    assert captured.err == "error  standard input, line 2 is not UTF-8 (byte 0: invalid start byte) → save it as UTF-8\n"
    assert captured.out == "".join(generate("--prompt", prompt, "--max_new_tokens", "5") for prompt in ("war", "peace"))


def test_ctrl_c_ends_a_text_and_not_the_session(generate, folder, monkeypatch, capfd):
    """The signal arrives while the third token is printed."""
    pieces = []

    def put(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"war\npeace\n")))
    monkeypatch.setattr(generate_file, "_put", put)
    assert research_main.main(["generate", str(folder.path), "--interactive", "--max_new_tokens", "9"]) == 0
    assert (pieces[0], pieces[4], pieces[5]) == ("war", "\n", "peace") and len(pieces) == 5 + 11
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_mistake_is_exit_code_2(generate):
    assert generate("--prompt", "a", "--top_k", "5", code=2).startswith("error  top_k = 5 has no effect")


@pytest.mark.parametrize("sampling", [pytest.param([], marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"])
def test_two_tensor_ranks_generate_what_one_generates(generate, sampling):
    """Equal ids. The second process is started for it and is gone afterwards."""
    words = ["--prompt", "war", "--prompt", "the people of", *sampling, "--max_new_tokens", "12", "--json"]
    assert rows(generate(*words, "--tensor", "2")) == rows(generate(*words))
