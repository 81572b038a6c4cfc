"""Hostile Hugging Face folders: config.json, weights, indexes and tokenizers, each wrong in one way (hostile_cases.py)."""

import functools
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.research.helpers.hostile_cases import (
    FILES,
    STEERING,
    TENSORS,
    WRONG,
    Bases,
    Case,
    assign,
    changed,
    import_command,
    replaced,
)

HF_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "vocab_size", "rms_norm_eps", "head_dim", "hidden_act", "rope_parameters",
)  # fmt: skip
TOKENIZER_FIELDS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def hf_cases(bases: Bases) -> Iterator[Case]:
    """Wrong config.json, weights and indexes."""

    def case(name: str, act: Callable[[Path], Any]) -> Case:
        def make(place: Path) -> list[str]:
            shutil.copytree(bases.hf, place / "model")
            act(place / "model")
            return import_command(place, "model")

        return Case(f"hf: {name}", make)

    for name, make in FILES.items():
        yield case(f"config.json is {name}", lambda folder, make=make: replaced(folder / "config.json", make))
    for name, make in TENSORS.items():
        yield case(f"model.safetensors is {name}", lambda folder, make=make: replaced(folder / "model.safetensors", make))
    for field in HF_FIELDS:
        for name, value in WRONG.items():
            if name != "null":
                yield case(f"{field} is {name}", functools.partial(_change_config, assign(field, value)))
    for name, header in safetensors_headers().items():
        yield case(f"weights: {name}", lambda folder, header=header: (folder / "model.safetensors").write_bytes(header))
    for name, table in indexes().items():
        yield case(f"index: {name}", lambda folder, table=table: _with_index(folder, table))
    yield case("pickles", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    yield case("names of programs", lambda folder: _with_programs(folder))


def _change_config(act: Callable[[dict], None], folder: Path) -> None:
    changed(folder / "config.json", act)


def safetensors_headers() -> dict[str, bytes]:
    """Wrong beginnings of a safetensors file."""

    def header(table: Any, length: int | None = None) -> bytes:
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)

    def tensor(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    name = "model.embed_tokens.weight"
    return {
        "a header of 2^63 bytes": header({}, 2**63),
        "a header of 80 MB": header(b"{}" + b" " * 80_000_000),
        "a header of values": header(b'{"a": [' + b"[]," * 2_000_000 + b"0]}"),
        "2^60 bytes": header({name: tensor([2**58], [0, 2**60])}),
        "an overflow": header({name: tensor([2**40, 2**40], [0, 64])}),
        "overlapping": header({name: tensor([8], [0, 32]), "b": tensor([8], [16, 48])}),
        "backwards": header({name: tensor([8], [32, 0])}),
        "negative": header({name: tensor([-8], [-32, 0])}),
        "another dtype": header({name: tensor([8], [0, 32], "F1024")}),
        "a name of 100,000": header({STEERING * 10_000: tensor([8], [0, 32])}),
        "no tensors": header({}),
    }


def indexes() -> dict[str, Any]:
    """Wrong weight maps."""
    return {
        "out of the folder": {"model.embed_tokens.weight": "../secret.json"},
        "from the root": {"model.embed_tokens.weight": "/etc/passwd"},
        "many files": {f"t{i}": f"{i}.safetensors" for i in range(20_000)},
        "an escape": {STEERING: f"{STEERING}.safetensors"},
        "a number": {"model.embed_tokens.weight": 7},
        "a list": ["a"],
        "missing": {"model.embed_tokens.weight": "a.safetensors"},
    }


def _with_index(folder: Path, table: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def _with_programs(folder: Path) -> None:
    """Programs that config.json and tokenizer_config.json name, and a head of weights that is missing so that the import ends."""
    program = f"open({str(folder.parent / 'ran')!r}, 'w')\nraise SystemExit(9)\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py"):
        (folder / name).write_text(program)
    code = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M", "AutoTokenizer": ["tokenization_x.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        changed(folder / name, lambda table: table.update(auto_map=code, tokenizer_class="T"))
    changed(folder / "config.json", lambda table: table.update(num_hidden_layers=3))


# Tokenizers


def tokenizer_cases(bases: Bases) -> Iterator[Case]:
    """Wrong tokenizer.json and the files beside it."""

    def case(name: str, act: Callable[[Path], Any]) -> Case:
        def make(place: Path) -> list[str]:
            shutil.copytree(bases.hf, place / "model")
            act(place / "model")
            return import_command(place, "model")

        return Case(f"tokenizer: {name}", make)

    for name, kind in FILES.items():
        yield case(f"tokenizer.json is {name}", lambda folder, kind=kind: replaced(folder / "tokenizer.json", kind))
    for file in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        for name in ("a link to a secret", "a link to /dev/zero", "a pipe", "many values"):
            yield case(f"{file} is {name}", lambda folder, file=file, name=name: replaced(folder / file, FILES[name]))
    for field in TOKENIZER_FIELDS:
        for name in ("text", "long", "negative", "huge", "list", "deep", "table"):
            act = assign(field, WRONG[name])
            yield case(f"{field} is {name}", lambda folder, act=act: changed(folder / "tokenizer.json", act))
    for name, act in tokenizer_bombs().items():
        yield case(name, lambda folder, act=act: changed(folder / "tokenizer.json", act))


def tokenizer_bombs() -> dict[str, Callable[[dict], None]]:
    """Tables that the library accepts and that make much of little."""

    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    def split(regex: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    doubling = [replace({"String": "a"}, "aa") for _ in range(30)]
    return {
        "a replacement of 20 MB": assign("normalizer", replace({"String": "a"}, "x" * 20_000_000)),
        "30 doublings": assign("normalizer", {"type": "Sequence", "normalizers": doubling}),
        "an empty pattern": assign("normalizer", replace({"Regex": ""}, "x" * 5000)),
        "a doubling decoder": assign("decoder", {"type": "Sequence", "decoders": doubling}),
        "counted repetitions": assign("pre_tokenizer", split("((a{1000}){1000}){1000}")),
        "a pattern of a megabyte": assign("pre_tokenizer", split("a|" * 500_000)),
        "a pattern without end": assign("pre_tokenizer", split(r"(\w+\s?)+$")),
        "alternatives without end": assign("pre_tokenizer", split(r"(x|[a-z]|\w)*\d\d\d$")),
        "an unknown token of a megabyte": assign("model.unk_token", "u" * 1_000_000),
        "a prefix of a megabyte": assign("model.continuing_subword_prefix", "u" * 1_000_000),
        "an id of 2^40": assign("added_tokens", [_added("<x>", 2**40)]),
        "an id of 2^31": assign("added_tokens", [_added("<x>", 2**31)]),
        "a negative id": assign("added_tokens", [_added("<x>", -1)]),
        "added tokens of 100,000 escapes": assign("added_tokens", [_added(STEERING * 10_000, 0)]),
        "100,000 added tokens": assign("added_tokens", [_added(f"<{i}>", i) for i in range(100_000)]),
        "a vocabulary of ids beyond": lambda table: table["model"]["vocab"].update({"zzz": 2**32 - 1}),
        "merges of unknown tokens": lambda table: table["model"]["merges"].append(["zzz", "qqq"]),
        "a table of characters": assign("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
        "a template of 100,000 texts": assign(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            },
        ),
    }


def _added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}
