"""Files that a stranger might send: Hugging Face folders, GGUF files, tokenizers, checkpoints and run folders, each wrong in one way.

Many are derived: every field of a table gets every value of WRONG. A case is the change of a good one (`Bases`), which is copied first,
and the command that reads it.
"""

import functools
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import digest
from research.tracking.run_folder import RunFolder

SECRET = "CANARY-of-a-file-that-nobody-named"
STEERING = "\x1b]0;owned\x07\x1b[2J\r\u202e\u200b\u2028\x9b31m\n"
WRONG: dict[str, Any] = {
    "text": "x", "long": STEERING * 10_000, "negative": -1, "zero": 0, "huge": 2**39, "beyond": 2**70, "float": 1.5e308,
    "NaN": float("nan"), "list": [], "deep": functools.reduce(lambda inner, _: [inner], range(500), []), "table": {}, "null": None,
}  # fmt: skip
HF_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "vocab_size", "rms_norm_eps", "head_dim", "hidden_act", "rope_parameters",
)  # fmt: skip
TOKENIZER_FIELDS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
RUN_FIELDS = ("status", "started", "ended", "layout", "precision", "steps", "reason", "overrides", "segments", "pid", "host")
SETTINGS = (
    "schema", "question", "model", "data", "precision", "seed", "schedule", "parallel", "track", "model.num_layers", "model.hidden_size",
    "model.num_heads", "model.num_kv_heads", "model.vocab_size", "model.seq_length", "model.norm", "model.norm_eps", "data.tokenizer",
)  # fmt: skip


@dataclass(frozen=True)
class Bases:
    """Good ones of each kind."""

    hf: Path
    gguf: Path
    run: Path
    """runs/NAME/ID"""


@dataclass(frozen=True)
class Case:
    """A hostile file: `make` makes it in a folder and returns the arguments of the verb that reads it."""

    name: str
    make: Callable[[Path], list[str]]
    shown: bool = False
    """Whether the verb lists others beside it, and so ends with 0."""


def cases(bases: Bases) -> Iterator[Case]:
    """All cases."""
    yield from hf_cases(bases)
    yield from tokenizer_cases(bases)
    yield from gguf_cases(bases)
    yield from checkpoint_cases(bases)
    yield from run_cases(bases)


# What any file can be


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 characters
        one.bind(path.name)
        os.chdir(here)


def _secret(path: Path) -> None:
    path.symlink_to(_place_of(path) / "secret.json")


def _place_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "secret.json").exists())


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a secret": _secret,
    "nothing": lambda path: path.write_bytes(b""),
    "2 GB of holes": _sparse(2**31),
    "1 TB of holes": _sparse(2**40),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "nested": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "many values": lambda path: path.write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"0]}"),
    "a long number": lambda path: path.write_bytes(b'{"a": ' + b"9" * 4000 + b"}"),
    "no table": lambda path: path.write_bytes(b"[]"),
}
"""What a file of JSON can be instead."""
TENSORS = {name: make for name, make in FILES.items() if name not in ("no table", "nested", "many values", "a long number")}


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    """Puts something else at `path`."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    make(path)


def changed(path: Path, act: Callable[[dict], None]) -> None:
    """Rewrites a JSON file, NaN included."""
    table = json.loads(path.read_text())
    act(table)
    path.write_text(json.dumps(table))


def assign(field: str, value: Any) -> Callable[[dict], None]:
    """Sets a dotted field."""

    def act(table: dict) -> None:
        *groups, last = field.split(".")
        for group in groups:
            table = table[group]
        table[last] = value

    return act


# Hugging Face folders


def _import(place: Path, source: str) -> list[str]:
    return ["import", source, "--as", str(place / "tree" / "experiments" / "mine"), "--runs", str(place / "runs")]


def hf_cases(bases: Bases) -> Iterator[Case]:
    """Wrong config.json, weights and indexes."""

    def case(name: str, act: Callable[[Path], Any]) -> Case:
        def make(place: Path) -> list[str]:
            shutil.copytree(bases.hf, place / "model")
            act(place / "model")
            return _import(place, "model")

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
            return _import(place, "model")

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


# GGUF files


def gguf_cases(bases: Bases) -> Iterator[Case]:
    """Wrong headers; and every file that is none."""

    def case(name: str, act: Callable[[Path], Any]) -> Case:
        def make(place: Path) -> list[str]:
            shutil.copyfile(bases.gguf, place / "model.gguf")
            act(place / "model.gguf")
            return _import(place, "model.gguf")

        return Case(f"gguf: {name}", make)

    for name, kind in TENSORS.items():
        yield case(f"the file is {name}", lambda path, kind=kind: replaced(path, kind))
    for name, content in gguf_headers().items():
        yield case(name, lambda path, content=content: path.write_bytes(content))
    size = bases.gguf.stat().st_size
    for part in range(1, 10):
        yield case(f"{part} tenths of it", lambda path, part=part: os.truncate(path, size * part // 10))
    for place, what in ((4, "version"), (8, "tensors"), (16, "fields"), (24, "length of the first name")):
        for name, number in (("2^31", 2**31), ("2^62", 2**62), ("2^64 - 1", 2**64 - 1)):
            yield case(f"{what} is {name}", lambda path, place=place, number=number: _overwritten(path, place, struct.pack("<Q", number)))


def _overwritten(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def gguf_headers() -> dict[str, bytes]:
    """Whole small files, each wrong in one place."""

    def text(value: str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(raw)) + raw

    def field(name: str, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    def array(kind: int, count: int, elements: bytes = b"") -> bytes:
        return struct.pack("<IQ", kind, count) + elements

    def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        return text(name) + struct.pack("<I", len(shape) if dims is None else dims) + sizes + struct.pack("<IQ", kind, offset)

    def file(fields: list[bytes], tensors: list[bytes] | None = None, version: int = 3, more: int = 4096) -> bytes:
        tensors = tensors or []
        head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
        return head + b"".join(fields) + b"".join(tensors) + bytes(more)

    tokens = "tokenizer.ggml.tokens"
    llama = field("general.architecture", 8, text("llama"))
    layers = field("llama.block_count", 10, struct.pack("<Q", 2**40))
    return {
        "an array of 2^40 numbers": file([field(tokens, 9, array(4, 2**40))]),
        "an array of 2^33 texts": file([field(tokens, 9, array(8, 2**33))]),
        "an array of 4 million texts": file([field(tokens, 9, array(8, 4_000_000, bytes(32_000_000)))]),
        "an array of 2 million texts": file([field(tokens, 9, array(8, 2_000_000, bytes(16_000_000)))]),
        "five million numbers": file([field(tokens, 9, array(0, 5_000_000, bytes(5_000_000)))]),
        "an array of arrays": file([field(tokens, 9, array(9, 1, array(9, 1, array(9, 2**62))))]),
        "a text of 2^62 bytes": file([field("a", 8, struct.pack("<Q", 2**62))]),
        "a text of 2 MB": file([field("a", 8, text("x" * 2**21))]),
        "a name of 2 kB": file([field("a" * 2000, 4, struct.pack("<I", 1))]),
        "an unknown type": file([field("a", 13, b"")]),
        "a type of 2^32 - 1": file([field("a", 2**32 - 1, b"")]),
        "a field twice": file([field("a", 4, bytes(4)), field("a", 4, bytes(4))]),
        "alignment 0": file([llama, field("general.alignment", 4, bytes(4))]),
        "alignment 3": file([llama, field("general.alignment", 4, struct.pack("<I", 3))]),
        "alignment 2^31": file([llama, field("general.alignment", 4, struct.pack("<I", 2**31))]),
        "alignment by name": file([llama, field("general.alignment", 8, text("32"))]),
        "version 1": file([llama], version=1),
        "version 99": file([llama], version=99),
        "big-endian": file([llama], version=3 << 24),
        "no dims": file([llama], [tensor("a", [])]),
        "2^32 - 1 dims": file([llama], [tensor("a", [1], dims=2**32 - 1)]),
        "no elements": file([llama], [tensor("a", [0])]),
        "2^62 elements": file([llama], [tensor("a", [2**62])]),
        "an overflow": file([llama], [tensor("a", [2**33, 2**33, 2**33, 2**33])]),
        "beyond the end": file([llama], [tensor("a", [2**20])]),
        "an offset of 2^60": file([llama], [tensor("a", [8], offset=2**60)]),
        "an odd offset": file([llama], [tensor("a", [8], offset=7)]),
        "overlapping": file([llama], [tensor("a", [32]), tensor("b", [32], offset=32)]),
        "a tensor twice": file([llama], [tensor("a", [8]), tensor("a", [8], offset=32)]),
        "an unknown packing": file([llama], [tensor("a", [8], kind=999)]),
        "rows that are no blocks": file([llama], [tensor("a", [8], kind=8)]),
        "factors without end": file([llama, layers], [tensor("rope_freqs.weight", [2**20])], more=2**23),
        "2^40 layers": file([llama, layers]),
        "an architecture of escapes": file([field("general.architecture", 8, text(STEERING * 1000))]),
        "a name that is no UTF-8": file([field("general.architecture", 8, text(b"\xff\xfe"))]),
    }


# Checkpoints


def checkpoint_cases(bases: Bases) -> Iterator[Case]:
    """Wrong manifests, with the right digest of themselves; and files that are none."""

    def case(name: str, act: Callable[[Path], Any], *verb: str) -> Case:
        def make(place: Path) -> list[str]:
            run = copied_run(bases, place)
            (checkpoint,) = (path for path in run.checkpoints.iterdir() if path.is_dir())
            act(checkpoint)
            return [*(verb or ("inspect", "--check")), str(run.path if verb else checkpoint)]

        return Case(f"checkpoint: {name}", make)

    def signed(act: Callable[[dict], None]) -> Callable[[Path], None]:
        def change(checkpoint: Path) -> None:
            table = json.loads((checkpoint / "manifest.json").read_text())
            table.pop("sha256")
            act(table)
            (checkpoint / "manifest.json").write_text(json.dumps(table | {"sha256": digest(table)}))

        return change

    def first(table: dict, name: str) -> tuple[dict, str]:
        """The table of files, or of weights, and the first name in it."""
        found = table["files"] if name == "files" else table["tensors"]["weights"]
        return found, next(iter(found))

    for name, make in FILES.items():
        yield case(
            f"manifest.json is {name}", lambda folder, make=make: replaced(folder / "manifest.json", make), "generate", "--prompt", "a"
        )
    for name, make in TENSORS.items():
        yield case(f"the weights are {name}", lambda folder, make=make: replaced(next(folder.glob("*.safetensors")), make))
    for field in ("format", "step", "tokens", "files", "tensors"):
        for name in ("text", "negative", "beyond", "float", "list", "null"):
            yield case(f"{field} is {name}", signed(assign(field, WRONG[name])))
    for part in ("shape", "dtype", "pieces"):
        for name in ("text", "huge", "beyond", "list", "table"):

            def wrong(table: dict, part: str = part, value: Any = WRONG[name]) -> None:
                tensors, first_name = first(table, "weights")
                tensors[first_name][part] = [value, value] if part == "shape" and isinstance(value, int) else value

            yield case(f"{part} of a tensor is {name}", signed(wrong))

    def renamed(new: str) -> Callable[[dict], None]:
        def act(table: dict) -> None:
            files, name = first(table, "files")
            files[new] = files.pop(name)

        return act

    for new in ("../../../secret.json", "/etc/passwd", STEERING, "a" * 5000):
        yield case(f"a file is called {new[:12]!r}", signed(renamed(new)))


# Run folders


def copied_run(bases: Bases, place: Path) -> RunFolder:
    """A copy of the good run, which this checkout has not made, on a text that comes with the code: `generate` works with it."""
    target = place / "runs" / "small" / "abcdef"
    shutil.copytree(bases.run, target, symlinks=True)
    (target / "made_here").unlink()
    texts = {"train": "builtin:state_of_the_union/val", "validation": "builtin:state_of_the_union/val"}
    changed(target / "config.json", lambda table: table["data"].update(texts))
    return RunFolder(target)


def run_cases(bases: Bases) -> Iterator[Case]:
    """Wrong run.json, config.json, rows, and what config.json may make a verb read, write and execute."""

    def case(name: str, act: Callable[[RunFolder], Any], *verb: str, shown: bool = False) -> Case:
        def make(place: Path) -> list[str]:
            run = copied_run(bases, place)
            act(run)
            return [*verb, *([str(run.path)] if verb[0] != "runs" else [])]

        return Case(f"run: {name} ({verb[0]})", make, shown)

    generate = ("generate", "--prompt", "the people", "--max_new_tokens", "2")
    for name, make in FILES.items():
        yield case(f"run.json is {name}", lambda run, make=make: replaced(run.run, make), "runs", shown=True)
        yield case(f"config.json is {name}", lambda run, make=make: replaced(run.config, make), *generate)
        yield case(f"metrics.jsonl is {name}", lambda run, make=make: replaced(run.metrics, make), "runs", shown=True)
        yield case(f"metrics.jsonl is {name}", lambda run, make=make: replaced(run.metrics, make), "plot")
        yield case(f"checkpoints/ is {name}", lambda run, make=make: replaced(run.checkpoints, make), *generate)
    for field in RUN_FIELDS:
        for name in ("text", "long", "beyond", "list", "null"):
            change = assign(field, WRONG[name])
            yield case(f"{field} is {name}", lambda run, change=change: changed(run.run, change), "runs", shown=True)
            yield case(f"{field} is {name}", lambda run, change=change: changed(run.run, change), "inspect", shown=True)
    for field in SETTINGS:
        for name in ("text", "long", "negative", "huge", "beyond", "NaN", "list"):
            yield case(f"{field} is {name}", functools.partial(_change_settings, assign(field, WRONG[name])), *generate)
    for field, name in (("data.train", "secret.txt"), ("data.tokenizer", "secret.json")):
        yield case(f"{field} is a secret", functools.partial(_with_secret, field, name), *generate)
    yield case("data.validation is a secret", functools.partial(_with_secret, "data.validation", "secret.txt"), "evaluate", "--limit", "1")
    yield case("variant.py is a program", _with_variant, *generate)
    yield case("incidents are pipes", lambda run: (run.incidents.mkdir(), _pipe(run.incidents / "a.json")), "inspect", shown=True)
    yield case("latest is a pipe", lambda run: replaced(run.checkpoints / "latest", _pipe), *generate)
    yield case("the checkpoints' cache is elsewhere", _with_cache, *generate, shown=True)
    yield case("evaluations/ leads elsewhere", _with_link("evaluations"), "evaluate", "--tasks", "agreement", "--limit", "1")
    yield case("wandb/ leads elsewhere", _with_link("wandb"), "track", "--mode", "offline")


def _change_settings(act: Callable[[dict], None], run: RunFolder) -> None:
    changed(run.config, act)


def _with_secret(field: str, name: str, run: RunFolder) -> None:
    """A file of its reader, named by its whole path. A tokenizer that is trained on it would show its words."""
    changed(run.config, assign(field, str(_place_of(run.path) / name)))


def _with_variant(run: RunFolder) -> None:
    (run.source / "variant.py").write_text(f"open({str(_place_of(run.path) / 'ran')!r}, 'w')\nclass Mine: pass\n")
    changed(run.config, assign("model.norm", "variant:Mine"))


def _with_cache(run: RunFolder) -> None:
    """A run whose config.json has the cache in a folder that is not its own to choose."""
    changed(run.config, assign("data.cache", str(_place_of(run.path) / "elsewhere")))


def _with_link(name: str) -> Callable[[RunFolder], None]:
    def act(run: RunFolder) -> None:
        elsewhere = _place_of(run.path) / "elsewhere"
        elsewhere.mkdir()
        _with_cache(run)
        replaced(run.path / name, lambda path: path.symlink_to(elsewhere))

    return act
