"""`data`: the documents of a step are those that training read, and a store's figures are those of its files, read here by numpy alone."""

import functools
import json
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.checkpoint.writer import write as write_checkpoint
from parallel.errors import Mistake
from research import __main__ as research
from research.cli import data, store_description
from research.config import Data, serialization
from research.config.batch_sizes import BatchSizes
from research.data import inspection, prepare
from research.data.batches import one_source
from research.data.token_store import TokenStore
from research.tracking import run_folder
from research.tracking.metrics import JsonLines
from research.tracking.own_runs import mark_as_own
from research.tracking.run_folder import RunFolder
from tests.research.helpers.example import example, sentence
from tests.research.helpers.small_runs import Stage
from tests.research.helpers.untrained import SMALL

WORDS = ("the", "people", "of", "union", "in", "peace", "and", "war", "have", "jobs", "health", "½", "élan")
LENGTHS = (1, 3, 200, 2, 40, 1, 1, 7, 90, 12, 5, 2, 30)


def texts() -> list[str]:
    """Documents of one word to two hundred, each of which names its number."""
    return [" ".join([f"no. {k}", *(WORDS[(k + i) % len(WORDS)] for i in range(count))]) for k, count in enumerate(LENGTHS)]


def write_texts(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
    return str(path)


def documents_on_disk(prefix: Path) -> list[np.ndarray]:
    """The documents of a store with one sequence per document, from its two files by the format's description."""
    raw = prefix.with_name(f"{prefix.name}.idx").read_bytes()
    magic, version, code, sequences, _ = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    ids = np.fromfile(prefix.with_name(f"{prefix.name}.bin"), {4: "<i4", 8: "<u2"}[code])
    return np.split(ids, np.cumsum(lengths)[:-1])


def shown_json(capsys: pytest.CaptureFixture, *argv: str) -> dict[str, Any]:
    data.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def tokens_of(sample: dict[str, Any], documents: list[np.ndarray]) -> list[int]:
    """The tokens of a sample, taken from the documents as `data` names them."""
    parts = [documents[one["document"]][one["offset"] :][: one["tokens"]] for one in sample["documents"]]
    assert [len(part) for part in parts] == [one["tokens"] for one in sample["documents"]]
    return np.concatenate(parts).tolist()


# A step of a run


def recording(place: str, rank: int) -> None:
    """A prelude: every rank keeps the micro-batches of each step, as the training loop gets them."""
    from research.training import loop

    inner = loop.step_batches

    def recorded(run: Any) -> Iterator[Any]:
        found = list(inner(run))
        arrays = {
            **{"ids": [batch.ids.numpy() for batch in found], "targets": [batch.labels[0].numpy() for batch in found]},
            **{"samples": [batch.context["samples"].numpy() for batch in found]},
        }
        np.savez(Path(place) / f"{run.step + 1}-{rank}.npz", **{name: np.concatenate(rows) for name, rows in arrays.items()})
        yield from found

    loop.step_batches = recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "micro"), [({"pipe": 1}, 2), ({"tensor": 2}, 4), ({"pipe": 2}, 1)], ids=["two data ranks", "two tensor ranks", "two stages"]
)
def test_the_documents_are_those_that_training_read(layout: dict, micro: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every step of a real run, over several epochs: sample by sample, the ids and the targets that its ranks were given."""
    stage, kept = Stage(tmp_path / "stage"), tmp_path / "kept"
    kept.mkdir()
    train = write_texts(tmp_path / "train.jsonl")
    prelude = functools.partial(recording, str(kept))
    ended = stage.run("run", 2, prelude=prelude, parallel=layout, data={"train": train}, schedule={"micro_batch_size": micro})
    assert ended.codes == [0, 0], ended.said
    (prefix,) = (path.with_suffix("") for path in (tmp_path / "stage" / "cache").glob("*train.jsonl*.idx"))
    documents, epochs = documents_on_disk(prefix), set()
    for step in range(1, 13):
        read: dict[int, list[int]] = {}
        for file in kept.glob(f"{step}-*.npz"):
            with np.load(file) as arrays:
                for sample, ids, targets in zip(arrays["samples"], arrays["ids"], arrays["targets"], strict=True):
                    read[int(sample)] = [*ids.tolist(), int(targets[-1])]
        shown = shown_json(capsys, str(ended.folder.path), "--step", str(step))
        assert [sample["sample"] for sample in shown["samples"]] == sorted(read) == list(range(8 * (step - 1), 8 * step))
        assert {sample["sample"]: tokens_of(sample, documents) for sample in shown["samples"]} == read
        assert shown["compared_with"] == "step_000012" and shown["last_logged_step"] == 12
        epochs |= {sample["epoch"] for sample in shown["samples"]}
    assert len(epochs) > 1 and min(epochs) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that has only begun: settings and texts, no checkpoint, no row."""
    place = tmp_path_factory.mktemp("data")
    train, validation = write_texts(place / "train.jsonl"), place / "validation.txt"
    validation.write_text("another text " * 20)
    texts_ = Data(train=train, validation=str(validation), tokenizer="builtin:bpe-384", cache=str(place / "cache"))
    experiment = example(model=SMALL, data=texts_, schedule={"steps": 20, "batch_size": 6, "micro_batch_size": 2})
    folder = run_folder.create(place / "runs", "small")
    folder.source.mkdir()
    serialization.save(experiment, folder.config)
    run_folder.start(folder, layout="pipe 1 × data 1 × tensor 1 · ZeRO-1", precision="fp32", steps=20)
    mark_as_own(folder)
    prepare.load(texts_, place, SMALL["vocab_size"])
    return folder


def test_a_step_is_what_the_sampler_gives_on_any_layout(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    experiment = serialization.load(run.config)
    corpus = prepare.load(experiment.data, Path(), 391)
    sampler, documents = one_source(corpus.train, 32, BatchSizes(6), 1, experiment.seed), documents_on_disk(corpus.train.prefix)
    for step in (1, 9):
        shown = shown_json(capsys, str(run.path), "--step", str(step))
        batches = [batch for rank in range(3) for batch in sampler.micro_batches(step - 1, rank, 3)]
        read = [[*batch.ids[0].tolist(), int(batch.targets[0, -1])] for batch in batches]
        assert [tokens_of(sample, documents) for sample in shown["samples"]] == read
        for sample in shown["samples"]:
            for one in sample["documents"]:  # the words are those of the file's line
                assert one["source"] == experiment.data.train
                ends_whole = one["text"].rstrip("\ufffd").lstrip("\ufffd")
                assert ends_whole in texts()[one["document"]]
                assert one["offset"] or one["text"].startswith(f"no. {one['document']}"[: len(one["text"])])
        windows = (sum(map(len, documents)) - 1) // 32
        assert [(sample["sample"], sample["epoch"]) for sample in shown["samples"]] == [
            (number, number // windows + 1) for number in range(6 * (step - 1), 6 * step)
        ]
        assert shown["compared_with"] is None and shown["last_logged_step"] == 0


def test_the_table_fits_the_terminal_and_says_what_is_left_out(run: RunFolder, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    data.main([str(run.path), "--step", "2", "--samples", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run.title} · step 2 of 20 · samples 6–11 of 32 + 1 tokens each"
    assert "no checkpoint tells whether the text is still the same" in lines[1]
    assert "step 2 is not in metrics.jsonl, there is no row yet" in lines[2]
    assert lines[3].split() == ["sample", "epoch", "window", "document", "offset", "tokens", "text"]
    assert max(map(len, lines[3:])) == 90 and lines[-1] == "and 2 more: --samples 6 prints all"
    assert [line.split()[0] for line in lines[4:-1] if line[:6].strip()] == ["6", "7", "8", "9"]
    assert not (run.lock.exists() or list(run.checkpoints.iterdir()))


def test_a_step_of_shorter_samples_shows_what_it_reads(run: RunFolder, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """From 8 tokens by 8 to 32 over 30 samples, in steps of 6: step 3 is the first of 16."""
    experiment = serialization.load(run.config)
    shorter = run_folder.create(run.path.parent.parent, "shorter")
    schedule = experiment.schedule.model_copy(update={"length_ramp": (8, 8, 30)})
    serialization.save(experiment.model_copy(update={"schedule": schedule}), shorter.config)
    run_folder.start(shorter, layout="", precision="fp32", steps=20)
    mark_as_own(shorter)
    documents = documents_on_disk(prepare.load(experiment.data, Path(), 391).train.prefix)
    for step, length in ((1, 8), (3, 16), (6, 32)):
        short, whole = (shown_json(capsys, str(folder.path), "--step", str(step))["samples"] for folder in (shorter, run))
        assert [tokens_of(one, documents) for one in short] == [tokens_of(one, documents)[: length + 1] for one in whole]
        assert [(one["sample"], one["epoch"], one["window"]) for one in short] == [(o["sample"], o["epoch"], o["window"]) for o in whole]
    data.main([str(shorter.path), "--step", "3"])
    assert capsys.readouterr().out.splitlines()[0].endswith(" of 16 + 1 tokens each")


def test_text_that_steers_a_terminal_is_escaped() -> None:
    documents = [{"source": "a\x1b[2J", "document": 1, "offset": 0, "tokens": 3, "text": "red\x1b[31m\nfoo \u202e 漢字" + "漢" * 50}]
    documents.append({**documents[0], "source": "b"})
    lines = list(data.table([{"sample": 0, "epoch": 1, "window": 5, "documents": documents}], 70))
    assert r"a\x1b[2J  red\x1b[31m foo" in lines[1] and "source" in lines[0] and len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_a_step_that_cannot_be_shown_is_a_sentence(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    path = str(run.path)
    for step in ("0", "-3", "21"):
        assert f"--step {step} is not one of the 20 steps of {run.title} → use 1 to 20" in sentence(
            lambda step=step: data.main([path, "--step", step])
        )
    assert f"is the run {run.title}, not a token store → add --step N" in sentence(lambda: data.main([path]))
    assert "--texts is for a token store → leave it or --step out" in sentence(lambda: data.main([path, "--step", "1", "--texts", "2"]))
    assert "--samples is for a step of a run → add --step N" in sentence(lambda: data.main([path, "--samples", "1"]))
    assert "there is no run folder nothing" in sentence(lambda: data.main(["nothing", "--step", "1"]))
    assert "nothing is neither a run nor a token store: there is no nothing.idx" in sentence(lambda: data.main(["nothing"]))
    assert "a whole number from 1" in sentence(lambda: data.main([path, "--step", "1", "--samples", "0"]))
    imported = RunFolder(tmp_path / "x" / "abcdef")
    imported.path.mkdir(parents=True)
    imported.run.write_text('{"status": "imported"}')
    assert "was imported, not trained" in sentence(lambda: data.main([str(imported.path), "--step", "1"]))


def test_another_text_than_the_checkpoint_s_is_refused(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment = serialization.load(run.config)
    copy = tmp_path / "train.jsonl"
    copy.write_bytes(Path(experiment.data.train).read_bytes())
    own = experiment.model_copy(update={"data": experiment.data.model_copy(update={"train": str(copy)})})
    folder = run_folder.create(tmp_path / "runs", "small")
    serialization.save(own, folder.config)
    run_folder.start(folder, layout="", precision="fp32", steps=20)
    mark_as_own(folder)
    then = prepare.load(own.data, tmp_path, 391).fingerprint
    facts = {"step": 3, "samples": 18, "tokens": 576, "data": then}
    write_checkpoint(folder.checkpoints / "step_000003", {"w": (1,)}, [torch.zeros(1)], facts)
    rows = JsonLines(folder.metrics)
    rows.write({"progress/step": 3})
    rows.close()
    shown = shown_json(capsys, str(folder.path), "--step", "3")
    assert (shown["compared_with"], shown["last_logged_step"]) == ("step_000003", 3)

    copy.write_text(copy.read_text().replace("no. 3", "no. 4"))
    now = prepare.load(own.data, tmp_path, 391).fingerprint
    words = f"step_000003 has the fingerprint {then[:16]}, today's files have {now[:16]} → put the old files back"
    assert words in sentence(lambda: data.main([str(folder.path), "--step", "3"]))


# A token store


def store_of(prefix: Path, lengths: list[int], ids: np.ndarray, sequences_per_document: int = 1) -> Path:
    """A store as the format's description says, int32, written without Tessera."""
    assert sum(lengths) == len(ids) and len(lengths) % sequences_per_document == 0
    pointers = np.cumsum([0, *lengths[:-1]]) * 4
    indices = np.arange(0, len(lengths) + 1, sequences_per_document)
    parts = [np.array(lengths, "<i4"), pointers.astype("<i8"), indices.astype("<i8")]
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(lengths), len(indices))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(b"".join([head, *(part.tobytes() for part in parts)]))
    prefix.with_name(f"{prefix.name}.bin").write_bytes(ids.astype("<i4").tobytes())
    return prefix


def test_figures_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """Of a store that another program has written, with empty documents and documents of two sequences. Read in small pieces."""
    monkeypatch.setattr(inspection, "DOCUMENTS", 7)
    draw = np.random.default_rng(1)
    for documents in (1, 2, 101, 200):
        lengths = np.maximum(0, draw.geometric(0.02, 2 * documents) - 3)
        lengths[-1] += 1
        ids = draw.integers(0, 70_000, lengths.sum())
        prefix = store_of(tmp_path / f"s.{documents}", lengths.tolist(), ids, 2)
        shown, of_documents = shown_json(capsys, f"{prefix}.bin"), lengths.reshape(-1, 2).sum(1).tolist()
        assert (shown["documents"], shown["tokens"], shown["type"]) == (documents, len(ids), "int32")
        assert shown["largest_id"] == ids.max() and shown["bytes"] is shown["source"] is shown["tokenizer"] is None
        assert shown["tokens_per_document"] == {
            **{"min": min(of_documents), "max": max(of_documents)},
            **{"median": statistics.median(of_documents), "mean": pytest.approx(statistics.mean(of_documents))},
        }
        counted = {bar["from"]: bar["documents"] for bar in shown["histogram"]}
        for bar in shown["histogram"]:
            assert bar["documents"] == sum(bar["from"] <= length <= bar["to"] for length in of_documents)
        assert sum(counted.values()) == documents and list(counted) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512][
            min(of_documents).bit_length() : max(of_documents).bit_length() + 1
        ]  # fmt: skip


def test_a_stretch_of_tokens_is_cut_into_its_documents(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    lengths = [*draw.integers(0, 6, 40).tolist(), 3]
    owner = [(k, i) for k, length in enumerate(lengths) for i in range(length)]
    store = TokenStore(store_of(tmp_path / "s", lengths, np.arange(sum(lengths))))
    for start in range(store.num_tokens - 1):
        for stop in (start + 1, min(start + 9, store.num_tokens), store.num_tokens):
            found = [(one.document, one.offset + i) for one in inspection.extracts(store, start, stop) for i in range(one.tokens)]
            assert found == owner[start:stop]
            assert [one.start for one in inspection.extracts(store, start, stop)][0] == start


def test_a_store_as_a_terminal_shows_it(run: RunFolder, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """The store of the run's text in data.cache, whose tokenizer lies beside it."""
    prefix = TokenStore(prepare.load(serialization.load(run.config).data, Path(), 391).train.prefix).prefix
    picture = tmp_path / "lengths.png"
    data.main([f"store:{prefix}", "--texts", "3", "--plot", str(picture)])
    said, sizes = capsys.readouterr().out, [len(document) for document in documents_on_disk(prefix)]
    num_bytes = sum(len(text.encode()) for text in texts())
    assert f"size     13 documents · {sum(sizes)} tokens · {num_bytes:,} bytes of text, {num_bytes / sum(sizes):.2f} per token" in said
    assert "ids      uint16 · the largest is " in said and "tokenizer builtin:bpe-384 (SHA-256 " in said
    for k in (0, 6, 12):
        assert f"text     document {k} · {sizes[k]} tokens · {texts()[k][:200]}" in said
    longest = max(said.split("\n"), key=lambda line: line.count("█"))
    bits = [size.bit_length() for size in sizes]
    assert f" {max(bits.count(bit) for bit in bits)}  {'█' * 40}" in longest
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_the_same_bars(tmp_path: Path) -> None:
    lengths = inspection.Lengths(np.array([0, 1, 3, 9]), np.array([2, 5, 1, 4]))
    histogram = [{"from": low, "to": high, "documents": count} for low, high, count in lengths.histogram()]
    axes = store_description.draw_lengths(histogram, lengths.median, "a $title").axes[0]
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert bars == [(-1, 1, 2), (0, 1, 5), (1, 1, 1), (2, 1, 0), (3, 1, 4)]


def test_texts_need_the_tokenizer_that_the_store_was_made_with(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A store's own tokenizer.json beside it is found; another one, and none, are refused."""
    corpus = prepare.load(serialization.load(run.config).data, Path(), 391)
    made = corpus.train.prefix
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"s{suffix}").write_bytes(made.with_name(made.name + suffix).read_bytes())
    prefix = str(tmp_path / "s")
    assert f"that {prefix} was made with (builtin:bpe-384), and no tokenizer.json" in sentence(lambda: data.main([prefix, "--texts", "1"]))
    assert "is another (SHA-256" in sentence(lambda: data.main([prefix, "--texts", "1", "--tokenizer", "builtin:gpt2"]))
    assert "is made from a text" in sentence(lambda: data.main([prefix, "--texts", "1", "--tokenizer", "builtin:bpe-300"]))
    assert "(builtin:gpt2 is meant?)" in sentence(lambda: data.main([prefix, "--texts", "1", "--tokenizer", "builtin:gpt3"]))
    assert "none are asked for → add --texts" in sentence(lambda: data.main([prefix, "--tokenizer", "builtin:gpt2"]))
    corpus.tokenizer.backend.save(str(tmp_path / "tokenizer.json"), pretty=False)
    assert [one["text"] for one in shown_json(capsys, prefix, "--texts", "99")["texts"]] == [text[:200] for text in texts()]
    (tmp_path / "s.json").unlink()
    foreign = store_of(tmp_path / "s", [2, 1], np.array([5, 391, 0]))
    assert "the largest id of" in sentence(lambda: data.main([str(foreign), "--texts", "1"]))


def test_files_that_are_no_store_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = store_of(tmp_path / "s", [2, 3], np.arange(5))
    for name, suffix, content, words in (
        ("cut", ".bin", (tmp_path / "s.bin").read_bytes()[:-1], "its index promises"),
        ("short", ".idx", (tmp_path / "s.idx").read_bytes()[:-1], "is cut short"),
        ("foreign", ".idx", b"GGUF" * 20, "is not a Megatron-LM index"),
        ("alone", ".idx", None, "alone.idx cannot be read"),
        ("half", ".bin", None, "half.bin is missing"),
    ):
        for end in (".bin", ".idx"):
            (tmp_path / f"{name}{end}").write_bytes(whole.with_name(f"s{end}").read_bytes())
        if content is None:
            (tmp_path / f"{name}{suffix}").unlink()
        else:
            (tmp_path / f"{name}{suffix}").write_bytes(content)
        assert research.main(["data", str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and words in said.err and said.err.startswith("error  ") and said.err.count("\n") == 1
    for picture in ("a.jpg", ""):
        assert "neither PNG nor SVG" in sentence(lambda picture=picture: data.main([str(whole), "--plot", picture]))
    assert "cannot be written" in sentence(lambda: data.main([str(whole), "--plot", str(tmp_path / "no" / "a.png")]))


def test_a_name_of_both_is_said(run: RunFolder, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(run.path.parent.parent.parent)
    store_of(Path("small"), [2, 3], np.arange(5))
    try:
        data.main(["small"])
        said = capsys.readouterr()
        assert "small · token store" in said.out
        assert f"small is a token store, small.idx, and a run: this is the store (with --step: the run {run.title})" in said.err
        data.main(["small", "--step", "1", "--samples", "1"])
        said = capsys.readouterr()
        assert f"this is the run {run.title}" in said.err and f"{run.title} · step 1" in said.out
        with pytest.raises(Mistake, match="which has no steps → leave --step out"):
            data.main(["./small.idx", "--step", "1"])
    finally:
        for suffix in (".idx", ".bin"):
            Path(f"small{suffix}").unlink()


def test_the_help_fits_80_columns_and_has_examples(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        data.main(["--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "data gpt_sotu --step 12" in said and "documents" in said
