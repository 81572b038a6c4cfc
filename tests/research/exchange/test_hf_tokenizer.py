"""A tokenizer's files, taken from a stranger and written for transformers: against transformers' own reading of what is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import transformers

from parallel.errors import Mistake
from research.data import tokenizer, tokenizer_file
from research.data.tokenizer_file import FILE, GENERATION, LONGEST_TEMPLATE, TEMPLATE, ends_of, special_tokens_of, template_of
from research.exchange.hf_tokenizer import copy_tokenizer, export_tokenizer, save_tokenizer
from tests.research.helpers.example import sentence
from tests.research.helpers.hf_models import their_tokenizer

CONFIG = "tokenizer_config.json"
TEXT = "We, the people — of 1787\n\n  and <|end|> after."
CHAT = "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


@pytest.fixture
def source(tmp_path) -> Path:
    """As transformers saves one."""
    their_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change(path: Path, **values) -> None:
    """Sets keys of a JSON table; makes it where there is none."""
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | values))


def taken(source: Path, ids: dict | None = None) -> tuple[Path, dict, dict]:
    """(the folder, its tokenizer_config.json, its generation_config.json)"""
    target = source.parent / "target"
    target.mkdir()
    copy_tokenizer(source / FILE, target, 64, ids or {})
    return target, json.loads((target / CONFIG).read_text()), json.loads((target / GENERATION).read_text())


def test_what_is_taken_is_the_same_tokenizer_to_transformers_and_to_us(source):
    target, config, _ = taken(source)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    assert (target / FILE).read_bytes() == (source / FILE).read_bytes()
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids and ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    assert ours.model_max_length == config["model_max_length"] == 64
    assert tokenizer_file.load(str(target / FILE), Path()).end_of_text == theirs.eos_token_id
    assert not (target / TEMPLATE).exists()


def test_a_special_token_may_be_a_table_or_known_by_its_id_alone(source):
    change(source / CONFIG, bos_token={"content": "<|end|>", "lstrip": False}, eos_token=None, unk_token=None)
    change(source / GENERATION, eos_token_id=[5, 0], pad_token_id=7)
    target, config, generation = taken(source)
    backend = tokenizer_file.parsed(target / FILE)
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|end|>", backend.id_to_token(5), backend.id_to_token(7))
    assert generation == {"bos_token_id": 0, "eos_token_id": [5, 0], "pad_token_id": 7} and "unk_token" not in config


def test_the_model_s_own_settings_name_the_ids_where_no_generation_config_does(source):
    change(source / CONFIG, eos_token=None, bos_token=None)
    _, config, generation = taken(source, {"eos_token_id": 3, "bos_token_id": 0, "vocab_size": 331})
    assert config["bos_token"] == "<|end|>" and config["eos_token"] not in (None, "<|end|>")
    assert generation == {"eos_token_id": 3, "bos_token_id": 0}


def test_a_name_that_is_no_token_of_it_adds_none(source):
    """transformers would give it the next id, which the model has no row for."""
    change(source / CONFIG, bos_token="<nobody>", pad_token={"content": "<nobody else>"})
    target, config, _ = taken(source)
    assert "bos_token" not in config and "pad_token" not in config
    assert len(transformers.AutoTokenizer.from_pretrained(target)) == 300


LONG = "x" * (LONGEST_TEMPLATE + 1)
TEMPLATES = {
    "in the table": ({"chat_template": CHAT}, None, CHAT, None),
    "of several, the default": (
        {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT}]}, None, CHAT,
        "chat templates other than the default: 'tools'",
    ),
    "of a table, the default": (
        {"chat_template": {"tools": "x", "default": CHAT}}, None, CHAT, "chat templates other than the default: 'tools'",
    ),
    "a file of its own goes first": ({"chat_template": "other"}, CHAT, CHAT, None),
    "of several, no default": (
        {"chat_template": [{"name": "tools", "template": "x"}]}, None, None, "chat templates without one called 'default': 'tools': none",
    ),
    "of a table, no default": (
        {"chat_template": {"tool_use": "x", "rag": "y"}}, None, None,
        "chat templates without one called 'default': 'rag', 'tool_use': none",
    ),
    "a list of anything": ({"chat_template": [3, None, "x", {"name": "default"}]}, None, None, None),
    "a number": ({"chat_template": 3}, None, None, "chat_template is no text: not taken"),
    "empty": ({"chat_template": ""}, None, None, None),
    "endless": ({"chat_template": LONG}, None, None, f"chat_template has {len(LONG)} characters, more than {LONGEST_TEMPLATE}: not taken"),
    "an endless file": ({}, LONG, None, f"{TEMPLATE}: {len(LONG)} bytes, more than {LONGEST_TEMPLATE}: not taken"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_is_kept_as_text_or_a_sentence_says_that_it_is_not(case, source):
    table, file, expected, said = TEMPLATES[case]
    change(source / CONFIG, **table)
    if file:
        (source / TEMPLATE).write_text(file)
    target = source.parent / "target"
    target.mkdir()
    sentences = copy_tokenizer(source / FILE, target, 64, {})
    assert "chat_template" not in json.loads((target / CONFIG).read_text())
    assert ((target / TEMPLATE).read_text() if (target / TEMPLATE).exists() else None) == expected
    assert len(sentences) == (said is not None) and (said or "") in "".join(sentences)
    if expected:
        theirs = transformers.AutoTokenizer.from_pretrained(target)
        text = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "<|end|>user: Hi"


def test_templates_in_files_of_their_own_are_named(source):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    (source.parent / "target").mkdir()
    assert copy_tokenizer(source / FILE, source.parent / "target", 64, {}) == [
        "chat templates without one called 'default': 'rag': none is taken → serve RUN --chat_template FILE"
    ]


def test_an_older_file_names_special_tokens_where_transformers_reads_it(source):
    """special_tokens_map.json goes before tokenizer_config.json, unless that lists the added tokens."""
    change(source / CONFIG, eos_token="<|end|>")
    change(source / "special_tokens_map.json", eos_token={"content": "a"})
    assert transformers.AutoTokenizer.from_pretrained(source).eos_token == "a"
    assert taken(source)[1]["eos_token"] == "a"
    change(source / CONFIG, added_tokens_decoder={"0": {"content": "<|end|>", "special": True}})
    shutil.rmtree(source.parent / "target")
    assert transformers.AutoTokenizer.from_pretrained(source).eos_token == taken(source)[1]["eos_token"] == "<|end|>"


def test_ids_that_are_none_are_named(source):
    """Beyond the model's table, or no ids at all; a name that is no token."""
    change(source / GENERATION, eos_token_id=[0, 300], pad_token_id="x")
    change(source / CONFIG, unk_token="<nobody>")
    (source.parent / "target").mkdir()
    assert copy_tokenizer(source / FILE, source.parent / "target", 64, {}, 300) == [
        "eos_token_id = [0, 300]: no ids of this model",
        "pad_token_id = 'x': no ids of this model",
        "tokenizer_config.json: unk_token = '<nobody>': no token of tokenizer.json that this model has a row for",
    ]
    assert json.loads((source.parent / "target" / GENERATION).read_text()) == {"bos_token_id": 0, "eos_token_id": 0}


def test_a_template_is_never_rendered_on_the_way(source, tmp_path):
    """Jinja outside of a sandbox reaches Python: what it would do, it does not do here."""
    harm = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "harm") + "') }}"
    change(source / CONFIG, chat_template=harm)
    target, _, _ = taken(source)
    assert (target / TEMPLATE).read_text() == harm and not (tmp_path / "harm").exists()


def test_nothing_is_taken_but_what_is_known(source):
    """Names of classes and code, whatever their shape, stay where they are."""
    (source / "evil.py").write_text("raise SystemExit('evil')")
    change(
        source / CONFIG, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}, added_tokens_decoder={"0": "x"},
        extra={"deep": []}, clean_up_tokenization_spaces=True, model_max_length=10**30, chat_template=None,
    )  # fmt: skip
    change(source / GENERATION, eos_token_id=0, custom_generate="evil.py", _from_model_config=True, max_length=10**9)
    target, config, generation = taken(source)
    assert sorted(os.listdir(target)) == [GENERATION, FILE, CONFIG]
    assert config == {
        "bos_token": "<|end|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    assert generation == {"bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("value", [True, -1, 2**31, 0.5, "0", {}, [], [0, -1], [[0]], [True], list(range(101)), None])
def test_what_is_no_id_is_left_out(value, source):
    """The end of a text then follows from the token that ends it: without it, transformers would never stop."""
    change(source / GENERATION, eos_token_id=value, pad_token_id=value)
    change(source / CONFIG, bos_token=None)
    target, config, generation = taken(source)
    assert generation == {"eos_token_id": 0} and "pad_token" not in config
    transformers.GenerationConfig.from_pretrained(target)


@pytest.mark.parametrize("value", [3, [], {"content": 3}, {"content": ""}, {}, "x" * 201, True])
def test_what_is_no_token_is_left_out(value, source):
    change(source / CONFIG, unk_token=value, pad_token=value)
    _, config, _ = taken(source)
    assert "unk_token" not in config and "pad_token" not in config and config["eos_token"] == "<|end|>"


HOSTILE = {
    "no tokenizer": (lambda p: (p / FILE).unlink(), "tokenizer.json is not there → .* --tokenizer builtin:gpt2, --tokenizer PATH"),
    "a pipe": (lambda p: ((p / FILE).unlink(), os.mkfifo(p / FILE)), "tokenizer.json is not there"),
    "no JSON": (lambda p: (p / FILE).write_bytes(b"\x80\x04pickle"), "tokenizer.json is not JSON"),
    "another table": (lambda p: (p / FILE).write_text("{}"), "tokenizer.json is not a tokenizer"),
    "a list": (lambda p: (p / CONFIG).write_text("[]"), "tokenizer_config.json holds no JSON object but a list"),
    "nested without end": (lambda p: (p / CONFIG).write_text("[" * 10**6), "tokenizer_config.json is not JSON"),
    "a constant": (lambda p: (p / GENERATION).write_text('{"eos_token_id": NaN}'), "generation_config.json is not JSON"),
    "large": (
        lambda p: (p / CONFIG).write_text(" " * (16 * 2**20 + 1)),
        "tokenizer_config.json cannot be read .it has 16,777,217 bytes, more than",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_is_wrong_is_one_sentence(what, source):
    act, words = HOSTILE[what]
    act(source)
    with pytest.raises(Mistake, match=words) as caught:
        taken(source)
    assert "→" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_one_that_lies_in_no_folder_is_put_down_the_same(tmp_path):
    """A GGUF file's."""
    backend = their_tokenizer().backend_tokenizer
    save_tokenizer(tmp_path, backend, {"eos_token": "<|end|>", "bos_token": None}, CHAT, 64)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found(TEXT).input_ids == backend.encode(TEXT).ids and found.chat_template == CHAT
    assert (found.eos_token_id, found.bos_token_id, found.model_max_length) == (0, None, 64)
    assert json.loads((tmp_path / GENERATION).read_text()) == {"eos_token_id": 0}


@pytest.mark.parametrize("make", [tokenizer.gpt2, lambda: None], ids=["builtin", "file"])
def test_a_run_s_tokenizer_is_what_transformers_reads(make, source, tmp_path):
    """Id by id; of ours, whose end-of-text is no letter of a text, and of a file's."""
    words = make() or tokenizer_file.load(str(source / FILE), Path())
    (tmp_path / "out").mkdir()
    ids = export_tokenizer(tmp_path / "out", words, Path(), 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = TEXT.replace("<|end|>", "")
    assert theirs(plain).input_ids == words.encode(plain) and theirs.decode(words.encode(plain)) == plain
    assert theirs.eos_token_id == ids["eos_token_id"] == words.end_of_text
    assert len(theirs) == words.vocab_size
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == words.end_of_text


def test_what_is_looked_for_is_what_transformers_writes(source):
    """Names of files and of keys, from transformers itself."""
    assert {FILE, CONFIG} <= set(os.listdir(source)) and tokenizer_file.CONFIG == CONFIG
    spoken = their_tokenizer()
    spoken.chat_template = CHAT
    spoken.save_pretrained(source)
    assert (source / TEMPLATE).read_text() == CHAT
    assert set(tokenizer_file.SPECIAL) < set(transformers.PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES)


def words(folder: Path):
    return tokenizer_file.load(str(folder / FILE), folder)


@pytest.mark.parametrize(
    ("told", "ends"), [(None, (0,)), (5, (0, 5)), ([5, 0, 7], (0, 5, 7)), ("5", (0,)), ([-1], (0,)), ([[1]], (0,)), (True, (0,))]
)
def test_a_text_ends_where_generation_config_says_and_at_end_of_text(source, told, ends):
    if told is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
    assert ends_of(words(source), source) == ends


def test_a_template_that_is_not_utf8_names_its_line_and_a_mark_is_no_part_of_it(source):
    (source / TEMPLATE).write_bytes(b"\xef\xbb\xbf{{ bos_token }}\n{{ '\xc3\xa9' }}")
    assert template_of(words(source), source) == "{{ bos_token }}\n{{ 'é' }}"
    (source / TEMPLATE).write_bytes(b"{{ bos_token }}\n{{ '\xe9' }}")
    assert f"{source / TEMPLATE}, line 2 is not UTF-8" in sentence(lambda: template_of(words(source), source))


def test_the_template_and_its_tokens(source):
    assert template_of(words(source), source) is None
    assert special_tokens_of(words(source), source) == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    theirs = their_tokenizer()
    theirs.chat_template = "{{ messages }}"
    theirs.save_pretrained(source)
    assert template_of(words(source), source) == "{{ messages }}"
    (source / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert template_of(words(source), source) == "yes"


def test_a_tokenizer_of_ours_has_nothing_beside_it(tmp_path):
    ours = tokenizer.gpt2()
    assert ends_of(ours, tmp_path) == (ours.end_of_text,)
    assert template_of(ours, tmp_path) is None and special_tokens_of(ours, tmp_path) == {}
