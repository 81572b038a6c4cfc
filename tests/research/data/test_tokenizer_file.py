"""A tokenizer.json as data.tokenizer: the library's own ids, the end of a text, and what a stranger may have put there."""

import json
import subprocess
import sys
import types

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from parallel.errors import Mistake
from research import ROOT
from research.data import prepare, tokenizer, tokenizer_file
from research.data.token_store import TokenStore

TEXT = "We the people of the United States, in order to form a more perfect union, …\n\n establish justice in 1787.\n"


def byte_level() -> Tokenizer:
    """As Llama 3's: its own pattern, which cuts numbers in threes, and a first token added by a post-processor."""
    found = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator([TEXT], trainer)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return found


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a normaliser of its own, spaces as letters, a vocabulary that is a list."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Replace(" ", "▁")
    found.decoder = decoders.Replace("▁", " ")
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False, initial_alphabet=list("▁the")
    )
    found.train_from_iterator([TEXT] * 3, trainer)
    return found


def saved(folder, backend, **config):
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_ids_are_the_librarys_without_anything_added(make, tmp_path):
    backend = make()
    saved(tmp_path, backend)
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    assert found.encode(TEXT) == backend.encode(TEXT, add_special_tokens=False).ids != []
    assert found.encode_batch([TEXT, "of"]) == [found.encode(TEXT), found.encode("of")]
    assert found.vocab_size == backend.get_vocab_size() == tokenizer_file.declared_vocab_size("tokenizer.json", tmp_path)
    assert found.end_of_text == backend.token_to_id("</s>")
    assert found.decode(found.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("single", "front"), [("<s> $A", ["<s>"]), ("<s> </s> $A", ["<s>", "</s>"]), ("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("$A", [])]
)
def test_a_prompt_begins_as_transformers_begins_it(single, front, tmp_path):
    """What the file's post-processor puts in front; what it puts behind would end the text before it was written."""
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    saved(tmp_path, backend)
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))(TEXT).input_ids
    assert list(found.prompt(TEXT)) == theirs[: len(front) + len(found.encode(TEXT))]
    assert found.begin == tuple(map(backend.token_to_id, front))
    assert found.prompt("") == (found.begin or (found.end_of_text,))


def test_the_letters_of_a_marker_are_text_and_padding_in_the_file_is_not_done(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    saved(tmp_path, backend)
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    assert found.end_of_text not in found.encode("one </s> two") and found.decode(found.encode("one </s> two")) == "one </s> two"


def test_a_text_is_never_cut_for_a_pattern_that_is_not_ours(tmp_path):
    """Before a newline ours may be cut; this one has '.\\n' as one piece."""
    saved(tmp_path, byte_level())
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    text = "justice in 1787.\n\n" * 4_000
    assert list(found.pieces(text)) == [text]
    settings = types.SimpleNamespace(train="a.txt", validation="a.txt", tokenizer="tokenizer.json", cache="cache")
    (tmp_path / "a.txt").write_text(text)
    store = prepare.load(settings, tmp_path, 300).train
    assert isinstance(store, TokenStore) and store.tokens.tolist() == [*found.encode(text), found.end_of_text]


def test_bytes_of_the_first_documents_are_those_of_their_text(tmp_path):
    """Spaces are three-byte letters in this vocabulary, and one byte in the text."""
    saved(tmp_path, sentencepiece())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "the the", TEXT)))
    settings = types.SimpleNamespace(train="a.jsonl", validation="a.jsonl", tokenizer="tokenizer.json", cache="cache")
    found = prepare.load(settings, tmp_path, 300)
    sizes = [prepare.leading_bytes(found.train, found.tokenizer, int(end)) for end in found.train.document_offsets()]
    assert sizes == [0, len(TEXT.encode()), len(TEXT.encode()) + 7, 2 * len(TEXT.encode()) + 7]


@pytest.mark.parametrize("eos", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
def test_the_end_of_a_text_is_the_one_that_the_config_names(eos, tmp_path):
    backend = byte_level()
    backend.add_special_tokens(["<|stop|>"])
    saved(tmp_path, backend, eos_token=eos)
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    assert found.end_of_text == backend.token_to_id("<|stop|>") == 300 and found.vocab_size == 301
    saved(tmp_path, backend, eos_token="</s>")
    assert tokenizer_file.load("tokenizer.json", tmp_path).fingerprint != found.fingerprint


def test_the_size_is_that_of_the_highest_id(tmp_path):
    """Not the number of tokens, which is smaller where ids have holes."""
    path = saved(tmp_path, byte_level())
    table = json.loads(path.read_text())
    table["model"]["vocab"]["rare"] = 900
    path.write_text(json.dumps(table))
    assert tokenizer_file.load("tokenizer.json", tmp_path).vocab_size == 901
    settings = types.SimpleNamespace(
        train="builtin:state_of_the_union/val", validation="builtin:state_of_the_union/val", tokenizer=str(path), cache="cache"
    )
    prepare.check(settings, tmp_path, 901)
    with pytest.raises(Mistake, match="model.vocab_size = 900 has no room for the 901 tokens of data.tokenizer"):
        prepare.check(settings, tmp_path, 900)


HOSTILE = ["", "{", "[]", "3", "[" * 100_000, '{"model": 3}', '{"model": {"vocab": 3}}', '{"model": {"vocab": [[]]}}', '{"a": NaN}']
HOSTILE += ['{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [[1, 2]]}}', '{"added_tokens": [3, {"id": "x"}]}', "\xff"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_file_is_one_sentence(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    for act in (tokenizer_file.load, tokenizer_file.declared_vocab_size):
        try:
            found = act("tokenizer.json", tmp_path)
        except Mistake as mistake:
            assert "→" in str(mistake) and "\n" not in str(mistake) and str(tmp_path) in str(mistake)
        else:
            assert act is tokenizer_file.declared_vocab_size and found > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": "<nobody>"}, "has no token '<nobody>'"),
        ({"eos_token": 3}, "does not say which token ends a text → name it in tokenizer_config.json"),
        ({"eos_token": ["</s>"]}, "does not say which token ends a text"),
    ],
)
def test_an_end_that_is_not_there_is_said(config, words, tmp_path):
    backend = byte_level()
    table = json.loads(backend.to_str().replace("</s>", "<end>"))
    saved(tmp_path, Tokenizer.from_str(json.dumps(table)), **config)
    with pytest.raises(Mistake, match=words):
        tokenizer_file.load("tokenizer.json", tmp_path)


def test_a_missing_one_is_refused_before_anything_is_imported(tmp_path):
    with pytest.raises(Mistake, match="no.json does not exist → name a tokenizer.json, or use builtin"):
        tokenizer_file.load("no.json", tmp_path)
    saved(tmp_path, byte_level())
    code = (
        "import sys; from pathlib import Path; from research.data import tokenizer_file as t; "
        f"print(t.declared_vocab_size('tokenizer.json', Path({str(tmp_path)!r})), [m for m in ('torch', 'tokenizers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "300 []\n"


def test_which_names_are_files():
    assert [tokenizer_file.is_file(name) for name in ("builtin:gpt2", "builtin:x.json", "a/tokenizer.json", "gpt2")] == [0, 0, 1, 0]


def panicking() -> Tokenizer:
    """Its pattern tries 2^n ways on n letters without an x behind them, and gives up at the limit of its engine."""
    found = byte_level()
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("(z+)+x"), "isolated"), found.pre_tokenizer])
    return found


def test_a_pattern_that_reaches_the_limit_of_its_engine_is_a_mistake(tmp_path):
    """The library raises a PanicException, which is no Exception. Texts that do not reach it are encoded as ever."""
    saved(tmp_path, panicking())
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    assert found.decode(found.encode(TEXT)) == TEXT
    for encode in (found.encode, found.prompt, lambda text: found.encode_batch(["a", text])):
        with pytest.raises(
            Mistake, match=r"tokenizer.json cannot encode a text of 40 characters \(Onig.*limit.*\) → shorten it, or"
        ) as caught:
            encode("z" * 40)
        assert "\n" not in str(caught.value)


def test_ids_that_cannot_be_decoded_are_a_mistake(tmp_path):
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("(z+)+x"), "")])
    saved(tmp_path, backend)
    found = tokenizer_file.load("tokenizer.json", tmp_path)
    with pytest.raises(Mistake, match=r"tokenizer.json cannot decode \d+ ids \(.*\) → "):
        found.decode(found.encode("z" * 40))


def test_a_tokenizer_is_read_once(tmp_path, monkeypatch):
    """What is checked is what is used: a file that is exchanged meanwhile changes neither."""
    path = tmp_path / "tokenizer.json"
    tokenizer.gpt2().backend.save(str(path))
    reads: list = []
    read = tokenizer_file.read_regular
    monkeypatch.setattr(tokenizer_file, "read_regular", lambda path, most: reads.append(path) or read(path, most))
    monkeypatch.setattr(tokenizer_file.regular_files, "read_regular", lambda path, most: reads.append(path) or read(path, most))
    tokenizer_file.load(str(path), tmp_path)
    assert reads == [path]
