"""A run on Megatron's stores takes the steps of a run on the text that they were made from, to the last bit."""

from pathlib import Path

import pytest

from research.config import serialization
from research.data import prepare
from tests.research.helpers import megatron_files
from tests.research.helpers.small_runs import Stage, bits


@pytest.mark.slow
def test_a_store_trains_to_the_losses_of_its_text(tmp_path: Path) -> None:
    """They are made here as Megatron's tools make them, of documents of several sequences: one store for each text, and one for both."""
    stage = Stage(tmp_path)
    text = stage.run("text")
    assert text.codes == [0], text.said
    data = serialization.load(text.folder.config).data
    corpus = prepare.load(data, tmp_path, 391)
    corpus.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))

    documents = {}
    for name, store in (("train", corpus.train), ("validation", corpus.validation)):
        ids = [store.tokens[begin:end].tolist() for begin, end in store.documents()]
        documents[name] = [[one[:5], one[5:]] for one in ids]
        megatron_files.write(tmp_path / f"{name}_text_document", documents[name], 8, "<u2")
    megatron_files.write(tmp_path / "both", documents["train"] + documents["validation"], 4, "<i4")
    share = f"{len(documents['train'])},{len(documents['validation'])}"

    named = {"train": f"store:{tmp_path}/train_text_document", "validation": f"store:{tmp_path}/validation_text_document"}
    both = {"train": f"store:{tmp_path}/both", "validation": f"split:{share}"}
    for name, changed in (("stores", named), ("both", both)):
        run = stage.run(name, data={**changed, "tokenizer": str(tmp_path / "tokenizer.json")})
        assert run.codes == [0], run.said
        for key in ("train/loss", "val/loss", "val/bits_per_byte"):
            assert run.hexes(key) == text.hexes(key) != {}
        assert bits(run.folder) == bits(text.folder)
