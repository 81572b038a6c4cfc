"""A stranger's Hugging Face folder: whatever is wrong with it is one sentence, and no file is opened that does not lie in it."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion import mapping, read_config
from parallel.errors import Mistake
from research.exchange import source
from research.exchange.hf_reader import INDEX, SINGLE, HFFolder
from tests.research.helpers.hf_models import their_folder

CASE = "gpt2"
WHOLE, SHARDS = "whole", "shards"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The same model in one file and in several."""
    place = tmp_path_factory.mktemp("folders")
    their_folder(place / WHOLE, CASE)
    their_folder(place / SHARDS, CASE, max_shard_size="100KB")
    return place


@pytest.fixture
def folder(folders, tmp_path):
    """copy(name): a copy to be damaged."""

    def copy(name: str) -> Path:
        for path in (folders / name).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


def read(path: Path) -> dict[str, torch.Tensor]:
    """All that import does with it before it writes, and then every weight."""
    with HFFolder(path) as opened:
        model = read_config.settings(opened.config)
        plan = mapping.plan(model, opened.family, opened.shapes)
        opened.check([key for link in plan.parameters for key in link.keys])
        return {link.name: tensor for link, tensor in zip(plan.parameters, source.weights(opened, plan, model), strict=True)}


def test_one_file_and_several_are_the_same_model(folders):
    one, several = read(folders / WHOLE), read(folders / SHARDS)
    assert len(list((folders / SHARDS).glob("*.safetensors"))) > 2
    assert one.keys() == several.keys() and all(torch.equal(tensor, several[name]) for name, tensor in one.items())
    with HFFolder(folders / SHARDS) as opened:
        assert {path.name for path in opened.files()} == {
            path.name for path in (folders / SHARDS).iterdir() if path.name in ("config.json", INDEX) or path.suffix == ".safetensors"
        }


def test_links_of_the_hubs_cache_are_followed_and_no_others(folders, tmp_path):
    """models--OWNER--NAME/snapshots/REVISION/FILE leads to the blobs of the same model; a link to anywhere else may be to a secret."""
    model, other = tmp_path / "models--owner--name", tmp_path / "models--owner--other" / "blobs"
    snapshot = model / "snapshots" / "0123abcd"
    for place in (snapshot, model / "blobs", other):
        place.mkdir(parents=True)
    for i, path in enumerate(sorted((folders / WHOLE).iterdir())):
        shutil.copyfile(path, model / "blobs" / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    assert read(snapshot).keys() == read(folders / WHOLE).keys()
    (tmp_path / "named").symlink_to(snapshot)  # the folder that is named may be reached by a link: its user has chosen it
    assert read(tmp_path / "named").keys() == read(folders / WHOLE).keys()
    for place in (other, tmp_path, model / "refs"):
        place.mkdir(exist_ok=True)
        shutil.copyfile(folders / WHOLE / "config.json", place / "elsewhere")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(place / "elsewhere")
        with pytest.raises(Mistake, match=f"config.json is a link that leads out of its folder, to {place}/elsewhere → copy the file"):
            read(snapshot)


def change(path: Path, name: str, act) -> None:
    table = json.loads((path / name).read_text())
    act(table)
    (path / name).write_text(json.dumps(table))


def settings(**changes):
    """Changes config.json."""
    return lambda path: change(path, "config.json", lambda table: table.update(changes))


def tensor(name: str, value: torch.Tensor):
    """Puts a tensor into the file."""
    return lambda path: retensor(path, lambda tensors: tensors.update({name: value}))


def retensor(path: Path, act) -> None:
    tensors = load_file(path / SINGLE)
    act(tensors)
    save_file(tensors, path / SINGLE)


def first_shard(path: Path) -> Path:
    return sorted(path.glob("model-*.safetensors"))[0]


def raw_header(path: Path, header: dict | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)


def add_twice(path: Path) -> None:
    """A tensor in the first two shards, whatever the index says."""
    first, second, *_ = sorted(path.glob("model-*.safetensors"))
    one, two = load_file(first), load_file(second)
    save_file({**two, **one}, second)


def pipe(path: Path) -> None:
    (path / SINGLE).unlink()
    os.mkfifo(path / SINGLE)


HOSTILE = {
    "no folder's files": (WHOLE, lambda p: (p / "config.json").unlink(), "config.json cannot be read"),
    "config: not JSON": (WHOLE, lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "config: a list": (WHOLE, lambda p: (p / "config.json").write_text("[]"), "config.json holds no JSON object but a list"),
    "config: nested": (WHOLE, lambda p: (p / "config.json").write_text('{"a":' * 100_000), "config.json is not JSON"),
    "config: huge": (WHOLE, lambda p: (p / "config.json").write_bytes(b" " * (17 << 20)), "more than 4,194,304"),
    "config: NaN": (WHOLE, lambda p: (p / "config.json").write_text('{"n_embd": NaN}'), "NaN is not JSON"),
    "config: latin-1": (WHOLE, lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json is not JSON"),
    "config: wrong type": (
        WHOLE,
        settings(n_layer="2"),
        "n_layer = '2', which is not a count",
    ),
    "config: layers": (
        WHOLE,
        settings(n_layer=10**9),
        "n_layer = 1000000000, which is not a count up to 4,096",
    ),
    "config: absurd": (
        WHOLE,
        settings(n_embd=2**19, n_head=1),
        r"makes embedding.weight \[331, 64\]",
    ),
    "config: odd and absurd": (WHOLE, settings(n_embd=2**37, n_head=7), "n_embd = 137438953472, which is not a count up to 1,048,576"),
    "config: beyond": (WHOLE, settings(n_embd=2**62), "n_embd = .* which is not a count"),
    "config: family": (
        WHOLE,
        settings(model_type="xlnet"),
        "model_type = 'xlnet' is not a family",
    ),
    "config: code": (
        WHOLE,
        settings(quantization_config={"x": 1}),
        "quantization_config is set",
    ),
    "no weights": (WHOLE, lambda p: (p / SINGLE).unlink(), f"holds neither {SINGLE} nor {INDEX} → name a Hugging Face folder"),
    "a pickle": (
        WHOLE,
        lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is a program.*save_pretr",
    ),
    "a gguf beside": (WHOLE, lambda p: (p / SINGLE).rename(p / "m.gguf"), "→ name the file: import .*m.gguf"),
    "cut short": (WHOLE, lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes()[:-100]), "model.safetensors cannot be read"),
    "no safetensors": (WHOLE, lambda p: (p / SINGLE).write_bytes(b"hello"), "model.safetensors cannot be read"),
    "header: endless": (WHOLE, lambda p: raw_header(p, b"{}", 2**63), "model.safetensors cannot be read"),
    "header: beyond": (
        WHOLE,
        lambda p: raw_header(p, {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}),
        "model.safetensors cannot be read",
    ),
    "header: nonsense": (WHOLE, lambda p: raw_header(p, b"[[[["), "model.safetensors cannot be read"),
    "a folder": (WHOLE, lambda p: ((p / SINGLE).unlink(), (p / SINGLE).mkdir()), "is a folder, not a file"),
    "a pipe": (WHOLE, pipe, "is a pipe, not a file"),
    "missing": (
        WHOLE,
        lambda p: retensor(p, lambda t: t.pop("transformer.ln_f.bias")),
        "hold no ln_f.bias, which final_norm.bias is made of",
    ),
    "left over": (
        WHOLE,
        tensor("extra", torch.ones(3)),
        "hold 1 tensors that this model lacks, the first is ex",
    ),
    "twice": (
        WHOLE,
        tensor("ln_f.bias", torch.ones(64)),
        "hold both .*ln_f.bias and .*ln_f.bias, which are the same",
    ),
    "misshapen": (
        WHOLE,
        tensor("transformer.h.0.attn.c_attn.weight", torch.ones(192, 64)),
        r"c_attn.weight makes blocks.0.attention.qkv.weight \[64, 192\]",
    ),
    "no dims": (
        WHOLE,
        tensor("transformer.wte.weight", torch.tensor(3.0)),
        r"makes embedding.weight \[\]",
    ),
    "empty": (
        WHOLE,
        tensor("transformer.wpe.weight", torch.ones(0, 64)),
        r"position.weight \[0, 64\]",
    ),
    "other head": (
        WHOLE,
        tensor("lm_head.weight", torch.ones(331, 64)),
        "the head's weights are not the embedding's → set tie_word_embeddings to false",
    ),
    "whole numbers": (
        WHOLE,
        tensor("transformer.ln_f.bias", torch.ones(64, dtype=torch.int8)),
        "ln_f.bias is I8, which is not read",
    ),
    "not finite": (
        WHOLE,
        lambda p: retensor(p, lambda t: t["transformer.ln_f.bias"].fill_(float("nan"))),
        "ln_f.bias holds values that are not finite",
    ),
    "index: not JSON": (SHARDS, lambda p: (p / INDEX).write_text("x"), "index.json is not JSON"),
    "index: no map": (SHARDS, lambda p: (p / INDEX).write_text('{"weight_map": []}'), "has no weight_map that is a table"),
    "index: no names": (SHARDS, lambda p: change(p, INDEX, lambda t: t["weight_map"].update(x=3)), "puts x into 3, no plain name"),
    "index: outside": (
        SHARDS,
        lambda p: change(p, INDEX, lambda t: t["weight_map"].update({"transformer.ln_f.bias": "../other.safetensors"})),
        "puts transformer.ln_f.bias into '../other.safetensors', no plain name of a .safetensors file → do not use it",
    ),
    "index: absolute": (SHARDS, lambda p: change(p, INDEX, lambda t: t["weight_map"].update(x="/a.safetensors")), "no plain name"),
    "index: hidden": (SHARDS, lambda p: change(p, INDEX, lambda t: t["weight_map"].update(x=".a.safetensors")), "no plain name"),
    "index: other kind": (SHARDS, lambda p: change(p, INDEX, lambda t: t["weight_map"].update(x="a.bin")), "no plain name"),
    "index: missing file": (
        SHARDS,
        lambda p: first_shard(p).unlink(),
        "cannot be read .No such file or directory. → fetch the folder again",
    ),
    "index: missing tensor": (
        SHARDS,
        lambda p: change(p, INDEX, lambda t: t["weight_map"].update(x=first_shard(p).name)),
        "names x, which model-00001-of-.* does not hold",
    ),
    "index: unnamed tensor": (
        SHARDS,
        lambda p: change(p, INDEX, lambda t: t["weight_map"].pop("transformer.wpe.weight")),
        "does not name it",
    ),
    "index: a tensor in two": (SHARDS, add_twice, "but model.safetensors.index.json says model-0000"),
    "index: many files": (
        SHARDS,
        lambda p: change(p, INDEX, lambda t: t["weight_map"].update({f"x{i}": f"m{i}.safetensors" for i in range(10_001)})),
        "more than 10000",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_is_wrong_is_one_sentence(what, folder):
    name, act, words = HOSTILE[what]
    path = folder(name)
    act(path)
    with pytest.raises(Mistake, match=words) as caught:
        read(path)
    assert "→" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700
