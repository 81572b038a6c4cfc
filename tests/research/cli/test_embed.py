"""`embed`: its vectors are transformers' hidden states, pooled; its files and its table; and every error in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from models.inference.sentence_encoder import POOLINGS, embed
from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake
from research.cli import embed as command
from research.generation.restore import DecoderSpec, restored_encoder
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence
from tests.research.helpers.hf_models import imported
from tests.research.helpers.plain_encoders import LENGTH, minilm_folder, their_folder

TEXTS = [
    "The people of the Union",
    "a very long text of the people, of the states and of the union in peace",
    "war",
    "Jobs, health and the budget: in 12 states",
    "",
]


class Case:
    """An encoder of transformers, its folder, and the run that an import makes of it."""

    def __init__(self, folder: Path, run: RunFolder) -> None:
        self.run = run
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def theirs(self, texts: list[str], pooling: str = "mean", normalize: bool = True) -> np.ndarray:
        """What the card of MiniLM says to do: the mean of the hidden states where the attention mask is 1."""
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.model.config.max_position_embeddings, return_tensors="pt"
        )
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs.attention_mask[..., None].float()
        vectors = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
        return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()

    def ours(self, texts: list[str], out: Path, *more: str) -> np.ndarray:
        """What the verb writes."""
        options = [word for text in texts for word in ("--text", text)]
        command.main([str(self.run.path), *options, "--out", str(out), *more])
        return np.load(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    place = tmp_path_factory.mktemp("embed")
    their_folder(place / "theirs")
    return Case(place / "theirs", imported(place / "theirs", place, "small"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("gpt"))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_transformers(pooling: str, normalize: bool, small: Case, tmp_path) -> None:
    found = small.ours(TEXTS, tmp_path / "found.npy", "--pooling", pooling, "--normalize" if normalize else "--no-normalize")
    theirs = small.theirs(TEXTS, pooling, normalize)
    assert found.dtype == np.float32 and found.shape == theirs.shape == (len(TEXTS), 64)
    assert np.abs(found - theirs).max() <= 1e-6 * np.abs(theirs).max()
    if normalize:
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_poolings_of_the_command_are_those_of_the_encoder() -> None:
    assert tuple(POOLINGS) == command.POOLINGS


def test_batch_and_order_do_not_matter(small: Case) -> None:
    """Each vector is that of its text alone, whatever is computed beside it."""
    encoder = restored_encoder(DecoderSpec(small.run.path, checkpoint_folder.latest(small.run.checkpoints)))
    rows = [small.tokenizer(text).input_ids for text in TEXTS]
    alone = torch.cat([embed(encoder, [row]) for row in rows])
    counted: list[int] = []
    for batch, order in ((1, [0, 1, 2, 3, 4]), (2, [4, 2, 0, 1, 3]), (8, [3, 1, 4, 0, 2])):
        found = embed(encoder, [rows[i] for i in order], batch=batch, advance=counted.append)
        assert (found - alone[order]).abs().max() <= 1e-6
    assert counted == [1, 1, 1, 1, 1, 2, 2, 1, 5]


def test_a_long_text_is_cut_as_transformers_cuts_it_and_the_command_says_so(small: Case, tmp_path, capsys) -> None:
    long = "the people of the union " * 50
    found = small.ours([TEXTS[0], long], tmp_path / "found.npy")
    assert np.abs(found - small.theirs([TEXTS[0], long])).max() <= 1e-6
    said = " ".join(capsys.readouterr().err.split())
    tokens = len(small.tokenizer(long).input_ids)
    assert f"1 of 2 texts has more than model.seq_length = {LENGTH} tokens (the longest {tokens:,})" in said and tokens > LENGTH


def test_files_in_and_out(small: Case, tmp_path) -> None:
    """Lines of text and JSON lines in, JSON lines out with the same numbers. A file that is there is replaced, and nothing is left."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:2]) + "\n\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps(TEXTS[1]) + "\n", encoding="utf-8")
    expected = small.ours(TEXTS[:2], tmp_path / "expected.npy")
    out = tmp_path / "out.jsonl"
    for name in ("texts.txt", "texts.jsonl"):
        out.write_text("old")
        command.main([str(small.run.path), "--file", str(tmp_path / name), "--out", str(out)])
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [record["text"] for record in records] == TEXTS[:2]
        assert np.array_equal(np.array([record["embedding"] for record in records], np.float32), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.npy", "out.jsonl", "texts.jsonl", "texts.txt"]


def test_without_a_file_there_is_a_table_of_cosines_or_one_vector(small: Case, capsys) -> None:
    words = [word for text in TEXTS[:3] for word in ("--text", text)]
    command.main([str(small.run.path), *words, "--no-normalize"])
    head, *rows = capsys.readouterr().out.splitlines()
    vectors = small.theirs(TEXTS[:3])
    assert head.split() == ["1", "2", "3"]
    for i, row in enumerate(rows):
        number, *cosines = row.split()[:4]
        assert number == str(i + 1) and row.endswith(TEXTS[i][:50]) == (len(TEXTS[i]) < 50)
        assert np.array(cosines, float) == pytest.approx(vectors @ vectors[i], abs=6e-4)
    command.main([str(small.run.path), *words[:2]])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == TEXTS[0] and np.abs(found["embedding"] - vectors[0]).max() <= 1e-6


def changed(case: Case, place: Path, **groups: dict) -> RunFolder:
    """A copy of the run whose settings differ."""
    copy = RunFolder(place / "runs" / "changed" / "abc123")
    shutil.copytree(case.run.path, copy.path)
    table = json.loads(copy.config.read_text())
    for group, settings in groups.items():
        table[group] |= settings
    copy.config.write_text(json.dumps(table))
    return copy


def test_a_model_that_was_trained_with_dropout_has_none_here(small: Case, tmp_path) -> None:
    dropout = {"embedding_dropout": 0.1, "residual_dropout": 0.2, "attention_dropout": 0.3}
    run = changed(small, tmp_path, model=dropout)
    encoder = restored_encoder(DecoderSpec(run.path, checkpoint_folder.latest(run.checkpoints)))
    found = embed(encoder, [small.tokenizer(text).input_ids for text in TEXTS])
    assert np.abs(found.numpy() - small.theirs(TEXTS)).max() <= 1e-6


def test_a_built_in_tokenizer_puts_nothing_around_a_text(small: Case, tmp_path) -> None:
    """So an empty text has no tokens, and no vector."""
    run = changed(small, tmp_path, data={"tokenizer": "builtin:bytes"})
    words = [str(run.path), "--trust", "--text", "war"]
    assert command.prepared(command.parser().parse_args(words)).rows == (tuple(b"war"),)
    said = sentence(lambda: command.prepared(command.parser().parse_args([*words, "--text", ""])))
    assert said == "text 2 of 2 has no tokens: it is empty → leave it out"


MISTAKES = {
    "no text": ([], "there is nothing to embed → give --text TEXT"),
    "no file": (["--file", "none.txt"], "--file none.txt cannot be read"),
    "ending": (["--text", "war", "--out", "vectors.csv"], "--out vectors.csv is neither a .npy nor a .jsonl file → name it vectors.npy"),
    "no folder": (["--text", "war", "--out", "none/vectors.npy"], "would lie in none, which is no folder"),
    "a large table": (
        ["--text", "war"] * 13,
        "the cosines of 13 texts are no table to read, 12 at most → write the vectors: --out FILE.npy",
    ),
    "batch": (["--text", "war", "--batch", "0"], "'0' is not a whole number from 1"),
    "pooling": (["--text", "war", "--pooling", "max"], "invalid choice: 'max'"),
    "step": (["--text", "war", "--checkpoint", "7"], "has no checkpoint of step 7 → it has 0"),
    "half a character": (["--text", "war \ud800"], "the text 'war \\ud800' is not UTF-8"),
    "option": (["--texts", "war"], "did you mean --text?"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence_before_torch(case: str, small: Case, tmp_path, monkeypatch) -> None:
    words, said = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    assert said in sentence(lambda: command.prepared(command.parser().parse_args([str(small.run.path), *words])))


def test_json_lines_without_texts_are_refused(small: Case, tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    for content, said in (
        ('{"prompt": "war"}\n', 'has no text that is text → write {"text": "…"}'),
        ("\n", "holds no text → write one a line"),
    ):
        file.write_text(content)
        words = [str(small.run.path), "--file", str(file), "--out", str(tmp_path / "out.npy")]
        assert said in sentence(lambda words=words: command.main(words))


def test_a_gpt_has_no_embeddings(gpt: RunFolder) -> None:
    said = sentence(lambda: command.main([str(gpt.path), "--text", "war"]))
    assert said.startswith("embed needs a BERT, and ") and "is a GPT → name a run of such a model, or use generate" in said


def test_a_model_that_has_diverged_is_refused(small: Case) -> None:
    encoder = restored_encoder(DecoderSpec(small.run.path, checkpoint_folder.latest(small.run.checkpoints)))
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.inf)
    with pytest.raises(Mistake, match="hidden states are not finite.* → take an earlier checkpoint"):
        embed(encoder, [[1, 2]])


# Real weights

PARAPHRASES = ("How do I get a replacement Medicare card?", "How can I replace my Medicare card?")
UNLIKE = "The cat sits outside"


@pytest.mark.slow
def test_minilm(tmp_path) -> None:
    """all-MiniLM-L6-v2: vectors as transformers and mean pooling make them, and paraphrases beside each other."""
    case = Case(minilm_folder(), imported(minilm_folder(), tmp_path, "minilm"))
    texts = [*PARAPHRASES, UNLIKE, "A man is eating a piece of bread. " * 100]
    found = case.ours(texts, tmp_path / "found.npy")
    theirs = case.theirs(texts)
    assert found.shape == (4, 384) and np.abs(found - theirs).max() <= 1e-6
    cosines = found @ found.T
    assert cosines[0, 1] > 0.8 and np.abs(cosines[:2, 2]).max() < 0.3
