"""What an import says that it leaves out: a sentence for each thing, and none for what transformers itself writes as a rule."""

import json
from pathlib import Path

import pytest
import transformers
from transformers.utils import CHAT_TEMPLATE_DIR, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from research.cli import generate
from research.data.tokenizer_file import CONFIG, FILE, GENERATION, LONGEST_TEMPLATE
from research.exchange import left_out
from research.exchange.gguf import GGUFFile
from research.exchange.hf_tokenizer import OLDER_TEMPLATE, TEMPLATES
from tests.research.helpers import gguf_files
from tests.research.helpers.hf_models import CASES, their_tokenizer


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_said_of_what_transformers_writes_as_a_rule(case):
    """But for GPT-2's dropout, and a window that hides nothing."""
    said = left_out.of_settings(CASES[case].to_dict())
    if case.startswith("gpt2"):
        assert (
            said.pop() == "config.json: embd_pdrop = 0.1, resid_pdrop = 0.1, attn_pdrop = 0.1: the model is trained further without dropout"
        )
    if case.startswith("mistral"):
        assert said.pop() == "config.json: sliding_window = 64: not kept, because no text of 64 tokens is longer"
    assert said == []


def test_keys_of_config_json_that_are_not_read_are_named():
    config = CASES["llama, grouped"].to_dict() | dict(
        attention_dropout=0.25, logit_scale=0.5, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, partial_rotary_factor=0.5, nothing=None
    )
    assert left_out.of_settings(config) == [
        "config.json: attention_dropout = 0.25: the model is trained further without dropout",
        'config.json: auto_map names programs ({"AutoModelForCausalLM": "modeling_x.X"}), which are not run',
        "config.json: logit_scale = 0.5, partial_rotary_factor = 0.5: not read",
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tokenizer and a generation configuration as transformers saves them."""
    their_tokenizer().save_pretrained(tmp_path)
    transformers.GenerationConfig(bos_token_id=0, eos_token_id=[0, 3], pad_token_id=1).save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_of_a_tokenizer_what_does_not_show_in_its_ids_is_named(folder):
    assert left_out.of_tokenizer(folder, 64) == []
    change(
        folder / CONFIG, clean_up_tokenization_spaces=True, model_max_length=32, mask_token="<mask>", extra_special_tokens=["<a>"],
        sep_token=None, added_tokens_decoder={"0": {"content": "<|end|>"}, "300": {"content": "<new>"}},
        auto_map={"AutoTokenizer": ["x.Y", None]},
    )  # fmt: skip
    change(folder / FILE, truncation={"max_length": 16}, padding=None)
    assert left_out.of_tokenizer(folder, 64) == [
        "tokenizer_config.json: clean_up_tokenization_spaces = true: here the spaces of a decoded text stay as they are",
        'tokenizer_config.json: auto_map names programs ({"AutoTokenizer": ["x.Y", null]}), which are not run',
        "tokenizer_config.json: model_max_length = 32: here a text may have 64 tokens, as config.json says",
        'tokenizer_config.json: extra_special_tokens = ["<a>"], mask_token = "<mask>": not kept; the tokens themselves stay',
        "tokenizer_config.json: added_tokens_decoder has '<new>', which tokenizer.json lacks: not added",
        'tokenizer.json: truncation to {"max_length": 16}: switched off',
    ]


def test_defaults_of_generation_are_named_with_the_options_that_set_them(folder):
    """The ids at which a text ends are taken, however many they are."""
    assert left_out.of_generation(folder) == []
    change(
        folder / GENERATION, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, bad_words_ids=[[3]], custom_generate="x.py"
    )
    assert left_out.of_generation(folder) == [
        "generation_config.json: not defaults here → generate … --temperature 0.6 --top_p 0.9 --repetition_penalty 1.1",
        'generation_config.json: bad_words_ids = [[3]], custom_generate = "x.py": without a counterpart',
    ]


def test_files_that_were_not_opened_are_named(folder):
    read = ["config.json", "model.safetensors"]
    assert left_out.of_files(folder, read) == []
    for name in (
        "README.md",
        "modeling_x.py",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        *map(str, range(9)),
    ):
        (folder / name).write_text("")
    (folder / "original").mkdir()
    adapter, others = left_out.of_files(folder, read)
    assert adapter.startswith(
        "adapter_config.json, adapter_model.safetensors: an adapter is not merged into the model → peft's merge_and_unload"
    )
    assert others == "not opened: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


def test_the_names_are_those_that_transformers_and_generate_have(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    told = capsys.readouterr().out
    assert [option for option in left_out.OPTIONS if f"--{option} " not in told] == []
    assert set(left_out.OPTIONS) <= transformers.GenerationConfig().to_dict().keys()
    assert (TEMPLATES, OLDER_TEMPLATE) == (CHAT_TEMPLATE_DIR, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)


def test_of_a_gguf_file_what_is_not_read_is_named(tmp_path):
    with GGUFFile(gguf_files.write(tmp_path / "m.gguf")) as file:
        assert left_out.of_metadata(file.metadata) == []
        more = {"llama.rope.scaling.original_context_length": 8192, "tokenizer.ggml.eot_token_id": 5, "general.name": "x"}
        assert left_out.of_metadata(file.metadata | more | {"tokenizer.chat_template": "x" * (LONGEST_TEMPLATE + 1)}) == [
            "tokenizer.chat_template has 1048577 characters, more than 1048576: not taken",
            "llama.rope.scaling.original_context_length = 8192: not read",
            "tokenizer.ggml.eot_token_id = 5: not read",
        ]
