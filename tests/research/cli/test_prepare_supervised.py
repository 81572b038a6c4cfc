"""`python -m research prepare --supervised`: stores with masks, every bad line in one sentence, and kills at any moment."""

import gzip
import hashlib
import json
import random

import pytest

pytest.importorskip("jinja2")

from research.__main__ import main
from research.data import corpus, corpus_inputs, tokenizer, tokenizer_file
from research.data.mask_store import TokenMask
from research.data.token_store import TokenStore
from tests.research.cli.test_prepare import check_kills, refused
from tests.research.generation.helpers import templates
from tests.research.helpers.killed_prepare import digest

WORDS = ["state", "union", "the", "of", "é", "猫", "people", "\n", "<|im_end|>"]
CHAT = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]}


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """said(arguments): (exit code, standard output, standard error) of the verb in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["prepare", *arguments, "--supervised", "--as", "mine", "--corpora", str(tmp_path / "corpora")])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def chatml(tmp_path):
    """A tokenizer's folder with its chat template in tokenizer_config.json."""
    folder = tmp_path / "their"
    folder.mkdir()
    table = json.loads(tokenizer.train_bpe(["the people of the union " * 9], 300).replace("<|endoftext|>", "<|im_end|>"))
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 300, "content": "<|im_start|>"})
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": templates.CHATML}))
    return folder


def examples(number: int, seed: int = 1) -> str:
    """Lines of both kinds."""
    draw, lines = random.Random(seed), []
    for i in range(number):
        said = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) + "." for _ in range(2 * draw.randrange(1, 4))]
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
        lines.append(json.dumps({"messages": turns} if i % 3 else {"prompt": said[0], "response": said[1], "id": i}))
    return "\n".join(lines) + "\n"


def test_conversations_become_stores_with_masks(said, tmp_path, chatml):
    """With the tokenizer's own template, and with several files, of which one is compressed and one is left out."""
    (tmp_path / "a.jsonl").write_text(examples(60))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl.gz").write_bytes(gzip.compress(examples(40, seed=2).encode()))
    (tmp_path / "more" / "notes.txt").write_text("notes")
    code, out, err = said("a.jsonl", "more", "--tokenizer", "their", "--split", "90,10")
    assert (code, err) == (0, "")
    place, lines = tmp_path / "corpora" / "mine", out.splitlines()
    assert "left out 1 file is left out (1 not .jsonl)" in lines and "template the tokenizer's own" in lines
    assert '  data.examples=Supervised(train_on="responses")' in lines
    assert (place / "chat_template.jinja").read_text() == templates.CHATML
    own = tokenizer_file.load(str(place / "tokenizer.json"), place)
    begin, end = (own.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    said_then = examples(60).splitlines() + examples(40, seed=2).splitlines()
    found = []
    for name in ("train", "val"):
        store = TokenStore(place / name)
        mask, offsets = TokenMask(store), store.document_offsets()
        assert (place / f"{name}.mask.bin").stat().st_size == store.num_tokens and mask.sums[-1] == mask.values.sum()
        for file, key in (("mask.bin", "mask_sha256"), ("mask.sums", "mask_sums_sha256")):
            assert hashlib.sha256((place / f"{name}.{file}").read_bytes()).hexdigest() == store.facts[key]
        for k in range(store.num_documents):
            ids, counts = (values[offsets[k] : offsets[k + 1]] for values in (store.tokens, mask.values))
            assert mask.sums[k + 1] - mask.sums[k] == counts.sum()
            answers = own.decode(ids[counts == 1])
            # the special tokens, and no letters of one, are tokens: as many as the template writes
            messages = ids.tolist().count(begin)
            assert ids.tolist().count(end) == messages and int((ids[counts == 1] == end).sum()) == (messages - 1) // 2
            found.append((own.decode(ids), answers))
    row = next(line.split() for line in lines if line.split()[:1] == ["train"])
    assert row[3] == f"{TokenStore(place / 'train').facts['mask_sum']:,}"
    expected = []
    for line in map(json.loads, said_then):
        turns = line.get("messages") or [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["response"]}]
        whole = "<|im_start|>system\nYou are helpful.<|im_end|>\n" + "".join(
            f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns
        )
        expected.append((whole, "".join(t["content"] + "<|im_end|>" for t in turns if t["role"] == "assistant")))
    assert sorted(found) == sorted(expected)


def test_the_template_that_was_used_lies_beside_the_tokenizer(said, tmp_path, chatml):
    """So a run of the corpus is served with it; without one, the tokenizer's own is not there either."""
    (tmp_path / "a.jsonl").write_text(examples(5))
    (tmp_path / "my.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    place, found = tmp_path / "corpora" / "mine", []
    for words in (("builtin:bytes", "--template", "my.jinja"), ("their", "--template", "plain")):
        code, _, err = said("a.jsonl", "--split", "100", "--replace", "--tokenizer", *words)
        assert code == 0, err
        template = place / "chat_template.jinja"
        facts = json.loads((place / "train.json").read_text())
        found.append((template.read_text() if template.is_file() else "", facts["form"].partition(" ")[0]))
    assert found == [((tmp_path / "my.jinja").read_text(), "chat"), ("", "plain")]


GOOD = json.dumps(CHAT)
BAD_LINES = {
    '{"text": "x", "id": 3}': "neither \"messages\" nor \"prompt\" and \"response\": its keys are 'text', 'id'",
    '{"prompt": "x"}': "neither \"messages\" nor \"prompt\" and \"response\": its keys are 'prompt'",
    "{}": "it has no key",
    "[1]": "is no object",
    '{"messages": ': "is not JSON",
    GOOD[:-1] + ', "prompt": "a", "response": "b"}': 'has both "messages" and "prompt" with "response"',
    '{"prompt": "x", "response": " \\n"}': "has an empty response",
    '{"prompt": ["x"], "response": "a"}': '"prompt" is no text',
    '{"messages": "x"}': '"messages" is no list of messages',
    '{"messages": []}': '"messages" is no list of messages',
    '{"messages": [{"from": "human", "value": "x"}]}': "message 1 has no \"role\" and \"content\", its keys are 'from', 'value'",
    '{"messages": [{"role": "User", "content": "x"}]}': "message 1 has the unknown role 'User' → use system, user or assistant",
    '{"messages": [{"role": "user", "content": "x"}]}': "has no message of the assistant",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}': "message 2 is an empty response",
    '{"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}': "message 1 has 'tool_calls', which is not used",
    '{"messages": [{"role": "assistant", "content": null}]}': '"content" is no text',
    '{"prompt": "x", "response": "\\ud800"}': "has half a surrogate pair",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_one_sentence_and_leaves_nothing(said, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    code, out, err = said("a.jsonl", "--tokenizer", "builtin:bytes")
    refused(code, out, err, BAD_LINES[line])
    assert f"{tmp_path}/a.jsonl, line 3" in err and not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["notes.txt"], "notes.txt is no .jsonl file"),
        (["folder"], "folder has no .jsonl file: 1 file is left out (1 not .jsonl)"),
        (["a.jsonl"], "--split 98,1,1 leaves train or val or test without an example of 3"),
        (["a.jsonl", "--key", "body"], "--key body is not for conversations"),
        (["a.jsonl", "--template", "none.jinja"], "--template none.jinja cannot be read"),
        (["a.jsonl", "--template", "empty.jinja"], "--template empty.jinja is empty"),
        (["a.jsonl", "--template", "bad.jinja"], "a.jsonl, line 1: the messages are refused by the chat template (never)"),
    ],
)
def test_a_bad_command_is_one_sentence_and_leaves_nothing(said, tmp_path, arguments, words):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n" * 3)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("notes")
    (tmp_path / "empty.jinja").write_text("")
    (tmp_path / "bad.jinja").write_text("{% if messages %}{{ raise_exception('never') }}{% endif %}")
    refused(*said(*arguments, "--tokenizer", "builtin:bytes"), words)
    assert not (tmp_path / "corpora").exists()


def test_a_template_without_conversations_is_refused(tmp_path, capsys):
    code = main(["prepare", str(tmp_path), "--as", "mine", "--template", "plain"])
    refused(code, *capsys.readouterr(), "--template plain is for conversations → add --supervised")


def test_half_surrogates_are_replaced_on_request(said, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "\\ud800"}\n' * 3)
    code, out, _ = said("a.jsonl", "--tokenizer", "builtin:bytes", "--split", "100", "--invalid", "replace")
    assert code == 0 and "counted  3 replacements by U+FFFD" in out
    store = TokenStore(tmp_path / "corpora" / "mine" / "train")
    assert bytes(store.tokens[:4].tolist()).decode() == "x\ufffd" and store.tokens[4] == 256 and store.num_tokens == 15


def test_parts_and_groups_leave_no_trace(said, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(examples(50))
    found = []
    for part, group in ((corpus.PART_TOKENS, corpus_inputs.GROUP), (300, 900)):
        monkeypatch.setattr(corpus, "PART_TOKENS", part)
        monkeypatch.setattr(corpus_inputs, "GROUP", group)
        code, _, err = said("a.jsonl", "--tokenizer", "builtin:bytes", "--split", "80,10,10", "--replace")
        assert code == 0, err
        found.append(digest(tmp_path / "corpora" / "mine"))
    assert found[0] == found[1] and "test.mask.sums" in found[0]


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(said, tmp_path, monkeypatch, chatml):
    (tmp_path / "a.jsonl").write_text(examples(200))
    monkeypatch.setattr(corpus_inputs, "GROUP", 2000)
    found = []
    for workers in ("1", "2", "3"):
        code, _, err = said("a.jsonl", "--tokenizer", "their", "--workers", workers, "--replace")
        assert code == 0, err
        found.append(digest(tmp_path / "corpora" / "mine"))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--tokenizer their", "--tokenizer builtin:bpe-300 --workers 2"])
def test_kills_at_many_moments_change_nothing(tmp_path, chatml, arguments):
    """Each kill ends the process, and the same command then gives the files of an undisturbed one, the masks included."""
    (tmp_path / "a.jsonl").write_text(examples(300))
    words = arguments.replace("their", str(chatml)).split()
    command = [str(tmp_path / "a.jsonl"), "--supervised", "--as", "mine", *words]
    expected = check_kills({"folder": str(tmp_path), "arguments": command, "sizes": [3000, 2000], "kills": 9, "seed": 3})
    assert "mine/train.mask.bin" in expected and all(name.startswith("mine/") for name in expected)
