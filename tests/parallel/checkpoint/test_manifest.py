"""The manifest parser refuses whatever would read outside the folder, too much, twice or nothing, and its error says where."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from parallel.checkpoint.manifest import File, Logical, Manifest, OtherFormat, Piece, parse
from tests.parallel.helpers.checkpoints import signed

HASH = "0" * 64
MANIFEST = {
    "format": 2,
    "step": 300,
    "samples": 4800,
    "data": {"any": ["thing"]},
    "files": {"weights-rank00000-000.safetensors": {"size": 4000, "sha256": HASH}, "b.safetensors": {"size": 4000, "sha256": HASH}},
    "tensors": {
        "weights": {
            "head.weight": {
                "shape": [10, 8],
                "dtype": "float32",
                "pieces": [
                    {"file": "weights-rank00000-000.safetensors", "key": "head.weight[0:6]", "dim": 0, "start": 0, "length": 6},
                    {"file": "b.safetensors", "key": "head.weight[6:10]", "dim": 0, "start": 6, "length": 4},
                ],
            },
            "norm.weight": {
                "shape": [8],
                "dtype": "float32",
                "pieces": [{"file": "b.safetensors", "key": "norm.weight", "dim": 0, "start": 0, "length": 8}],
            },
        }
    },
}
HEAD, NORM = MANIFEST["tensors"]["weights"].values()


def changed(change: Callable[[dict], Any]) -> bytes:
    told = copy.deepcopy(MANIFEST)
    change(told)
    return json.dumps(signed(told)).encode()


def head(told: dict) -> dict:
    return told["tensors"]["weights"]["head.weight"]


def both(told: dict) -> list[dict]:
    return head(told)["pieces"]


def test_an_honest_one_is_read_as_it_is() -> None:
    manifest = parse(json.dumps(signed(MANIFEST)).encode())
    assert manifest.facts == {"step": 300, "samples": 4800, "data": {"any": ["thing"]}}
    assert manifest.files["b.safetensors"] == File(4000, HASH)
    whole = manifest.tensors["weights"]["head.weight"]
    assert (whole.shape, whole.dtype, whole.numel) == ((10, 8), "float32", 80)
    assert whole.pieces[1] == Piece("b.safetensors", "head.weight[6:10]", 0, 6, 4) and whole.pieces[1].shape(whole.shape) == (4, 8)


def test_what_is_written_is_what_is_read() -> None:
    moments = {kind: {"a.b": Logical((3, 4), "float32", (Piece("x", kind, 1, 0, 4),))} for kind in ("weights", "exp_avg", "exp_avg_sq")}
    manifest = Manifest({"step": 1, "note": 'ü "quoted"', "loss_scale": 65536.0}, {"x": File(200, HASH)}, moments)
    assert parse(manifest.text().encode()) == manifest
    assert json.loads(manifest.text())["tensors"]["exp_avg"]["a.b"]["shape"] == [3, 4]


def test_a_flipped_bit_anywhere_is_found() -> None:
    """Also where it makes one honest manifest another: step 300 → 301."""
    text = Manifest({"step": 300, "samples": 4800, "data": {"any": ["thing", 1e-3]}}, *parts_of(changed(lambda told: None))).text().encode()
    parse(text)
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            parse(bytes(flipped))


def parts_of(text: bytes) -> tuple:
    manifest = parse(text)
    return manifest.files, manifest.tensors


def test_facts_are_read_as_json_has_them() -> None:
    facts = {"step": 1, "betas": (0.9, 0.95), "by number": {10: "a", 9: "b"}}
    manifest = parse(Manifest(facts, *parts_of(changed(lambda told: None))).text().encode())
    assert manifest.facts == {"step": 1, "betas": [0.9, 0.95], "by number": {"10": "a", "9": "b"}}


@pytest.mark.parametrize("fact", ["format", "files", "tensors", "sha256"])
def test_a_fact_cannot_be_a_table(fact: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called {fact}"):
        Manifest({"step": 1, fact: 3}, {}, {}).text()


def test_a_fact_that_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Manifest({"step": 1, "loss": float("nan")}, {}, {}).text()


TEXTS = {
    "nothing": (b"", "Expecting value"),
    "no table": (b"[]", "not a table"),
    "empty": (b"{}", "has no format"),
    "cut short": (json.dumps(MANIFEST).encode()[:300], "delimiter|Unterminated|Expecting"),
    "binary": (b"\x00\x01", "Expecting value"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "can't decode"),
    "deep": (b"[" * 100_000, "nested too deeply|maximum recursion"),
    "a number without end": (b'{"format": 2, "step": ' + b"9" * 10_000 + b"}", "it has a number of"),
    "a key twice": (b'{"format": 2, "format": 2}', "'format' is there twice"),
    "unsigned": (json.dumps(MANIFEST).encode(), "its own sha256 is not that of what it says"),
    "another's signature": (json.dumps(MANIFEST | {"sha256": HASH}).encode(), "its own sha256 is not that of what it says"),
    "a tensor twice": (
        json.dumps(MANIFEST).replace('"norm.weight": {', '"head.weight": {').encode(),
        "'head.weight' is there twice",
    ),
    "NaN": (b'{"format": 2, "step": NaN}', "NaN is not JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_manifest_is_refused(name: str) -> None:
    text, words = TEXTS[name]
    with pytest.raises(ValueError, match=words):
        parse(text)


@pytest.mark.parametrize("version", [1, 3, "2", None, True, 2.5])
def test_another_format_is_refused_with_both_numbers(version: Any) -> None:
    with pytest.raises(OtherFormat, match=f"has format {version!r}, this version reads format 2"):
        parse(changed(lambda told: told.update(format=version)))


NAMES = ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "a\0b", "a b", "ä", "x" * 300, "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_lies_beside_the_manifest(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        parse(changed(lambda told: told["files"].update({name: {"size": 1, "sha256": HASH}})))
    with pytest.raises(ValueError, match="which is not among the files"):
        parse(changed(lambda told: both(told)[0].update(file=name)))


REFUSED: dict[str, tuple[Callable[[dict], Any], str]] = {
    # facts
    "no step": (lambda told: told.pop("step"), "has no step"),
    "a negative step": (lambda told: told.update(step=-1), "its step is not a count: -1"),
    "a step that is true": (lambda told: told.update(step=True), "its step is not a count: True"),
    "half a sample": (lambda told: told.update(samples=0.5), "its samples is not a count: 0.5"),
    "endless tokens": (lambda told: told.update(tokens=2**70), "its tokens is not a count"),
    # files
    "no files": (lambda told: told.pop("files"), "its files are not a table"),
    "files in a list": (lambda told: told.update(files=[1]), "its files are not a table"),
    "no size": (lambda told: told["files"]["b.safetensors"].pop("size"), "is not a table of sha256, size"),
    "a size in words": (lambda told: told["files"]["b.safetensors"].update(size="1"), "has the size '1'"),
    "a short hash": (lambda told: told["files"]["b.safetensors"].update(sha256="abc"), "has no SHA-256"),
    "a hash of capitals": (lambda told: told["files"]["b.safetensors"].update(sha256="A" * 64), "has no SHA-256"),
    "more in an entry": (lambda told: told["files"]["b.safetensors"].update(mode=7), "is not a table of sha256, size"),
    "a file that is a number": (lambda told: told["files"].update(b=1), "is not a table of sha256, size"),
    # kinds
    "no tensors": (lambda told: told.pop("tensors"), "its tensors are not a table"),
    "a path as a kind": (lambda told: told["tensors"].update({"../a": {"a": {}}}), "'../a' is not the name of an optimizer's state"),
    "an empty kind": (lambda told: told["tensors"].update(weights={}), "is not a table of tensors"),
    "moments only": (lambda told: told["tensors"].update(exp_avg=told["tensors"].pop("weights")), "it holds exp_avg, but no weights"),
    "a moment less": (
        lambda told: told["tensors"].update(exp_avg={"norm.weight": NORM}, exp_avg_sq={"norm.weight": NORM}),
        "exp_avg are not of the same tensors",
    ),
    # shapes and types
    "a negative size": (lambda told: head(told).update(shape=[-10, 8]), "has the shape"),
    "no elements": (lambda told: head(told).update(shape=[0, 8]), "has the shape"),
    "an absurd size": (lambda told: head(told).update(shape=[10**30, 8]), "has the shape"),
    "more than its file": (lambda told: head(told).update(shape=[10, 10**15]), "has 4000 bytes, its tensors"),
    "a broken size": (lambda told: head(told).update(shape=[10.0, 8]), "has the shape"),
    "a size that is true": (lambda told: head(told).update(shape=[True, 8]), "has the shape"),
    "a shape in words": (lambda told: head(told).update(shape="10×8"), "has the shape"),
    "no dims": (lambda told: head(told).update(shape=[]), "has the shape"),
    "too many dims": (lambda told: head(told).update(shape=[1] * 9), "has the shape"),
    "an unknown dtype": (lambda told: head(told).update(dtype="object"), "unknown dtype 'object'"),
    "a dtype in a list": (lambda told: head(told).update(dtype=["float32"]), "unknown dtype"),
    "no dtype": (lambda told: head(told).pop("dtype"), "is not a table of dtype, pieces, shape"),
    # pieces
    "no pieces": (lambda told: head(told).update(pieces=[]), "has no list of pieces"),
    "pieces in a table": (lambda told: head(told).update(pieces={}), "has no list of pieces"),
    "a piece that is a name": (lambda told: head(told).update(pieces=["a"]), "is not a table of dim, file, key, length, start"),
    "no key": (lambda told: both(told)[0].pop("key"), "is not a table of dim, file, key, length, start"),
    "an empty key": (lambda told: both(told)[0].update(key=""), "has no key"),
    "a negative start": (lambda told: both(told)[0].update(start=-1), "not placed by three counts"),
    "a start in words": (lambda told: both(told)[0].update(start="0"), "not placed by three counts"),
    "a dim it has not": (lambda told: [piece.update(dim=2) for piece in both(told)], "not cut along one of its dims"),
    "two dims": (lambda told: both(told)[1].update(dim=1), "not cut along one of its dims"),
    "a file in a list": (lambda told: both(told)[0].update(file=["b.safetensors"]), "which is not among the files"),
    # covering
    "the begin missing": (lambda told: both(told).pop(0), "lacks 0:6 along dim 0"),
    "the end missing": (lambda told: both(told).pop(1), "lacks 6:10 along dim 0"),
    "a gap": (lambda told: both(told)[0].update(length=5), "lacks 5:6 along dim 0"),
    "an overlap": (lambda told: both(told)[0].update(length=7), "has 6:7 along dim 0 twice"),
    "one inside another": (lambda told: both(told)[0].update(length=10), "has 6:10 along dim 0 twice"),
    "beyond the end": (lambda told: both(told)[1].update(length=5), "ends at 10 along dim 0, its pieces at 11"),
    "an empty piece": (lambda told: both(told)[0].update(length=0), "has an empty piece"),
    "one piece twice": (lambda told: both(told).append(copy.deepcopy(both(told)[1])), "has 6:10 along dim 0 twice"),
    "two tensors in one place": (
        lambda told: told["tensors"]["weights"].update(other=copy.deepcopy(NORM)),
        "'norm.weight' of b.safetensors is used 2 times",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_hold_together_is_refused(name: str) -> None:
    change, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        parse(changed(change))
