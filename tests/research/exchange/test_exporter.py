"""What an export writes: the same bits when it is imported again, nothing of a damaged checkpoint, no setting without a counterpart."""

import os
from pathlib import Path

import pytest
import torch
import transformers

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from research.cli import export
from research.config import serialization
from research.data import tokenizer
from research.data.run_tokenizer import load_tokenizer
from research.tracking import run_folder
from research.tracking.own_runs import mark_as_own
from research.tracking.run_folder import RunFolder
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers.example import example
from tests.research.helpers.hf_models import imported
from tests.research.helpers.launches import ROOT, Ended
from tests.research.helpers.untrained import make


def test_imported_again_it_is_the_same_to_the_bit(tensor_2: Ended, tmp_path):
    """What two ranks trained here and saved, out and in again: every weight, every setting of the model, every token."""
    run = tensor_2.folder
    export.main([str(run.path), str(tmp_path / "out")])
    back = imported(tmp_path / "out", tmp_path, "back")
    with Reader(latest(run.checkpoints)) as before, Reader(latest(back.checkpoints)) as after:
        assert set(before) == set(after) and before.facts["layout"]["tensor"] == 2
        assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    first, second = serialization.load(run.config), serialization.load(back.config)
    assert second.model == first.model
    ours, theirs = (load_tokenizer(experiment.data, ROOT) for experiment in (first, second))
    text = "The state of the union — is\n\n strong in 2016."
    assert theirs.encode(text) == ours.encode(text) and theirs.end_of_text == ours.end_of_text


def test_a_damaged_checkpoint_is_not_exported(tensor_2: Ended, tmp_path):
    """A flipped bit of a weight is a number like any other."""
    run = RunFolder(tmp_path / "runs" / "x" / "abcdef")
    run.checkpoints.mkdir(parents=True)
    run.config.write_bytes(tensor_2.folder.config.read_bytes())
    mark_as_own(run)
    source = tensor_2.folder.checkpoints / "step_000006"
    (run.checkpoints / source.name).mkdir()
    for path in source.iterdir():
        (run.checkpoints / source.name / path.name).write_bytes(path.read_bytes())
    damaged = next((run.checkpoints / source.name).glob("weights-rank00000*"))
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(Mistake, match="is damaged: SHA-256"):
        export.main([str(run.checkpoints / source.name), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["runs"]


def untrained(place: Path, **model) -> RunFolder:
    run = run_folder.create(place / "runs", "mine")
    serialization.save(example(model=model), run.config)
    save(run.checkpoints / "step_000001")
    run_folder.start(run, layout="", precision="fp32", steps=1)
    checkpoint_folder.point_latest(run.checkpoints / "step_000001")
    return run


@pytest.mark.parametrize("letters", ["ab é\n", "猫犬"])
def test_a_run_on_characters_is_exported_and_imported_again(letters, tmp_path):
    """Its tokenizer encodes little of the certificate's text, or nothing of it."""
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.made_from(tokenizer.CHARS, [letters]), encoding="utf-8")
    run = make(tmp_path)
    settings = serialization.load(run.config)
    data = settings.data.model_copy(update={"tokenizer": str(file)})
    serialization.save(settings.model_copy(update={"data": data}), run.config)
    mark_as_own(run)
    export.main([str(run.path), str(tmp_path / "out")])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(letters).input_ids == [sorted(letters).index(letter) for letter in letters]
    assert theirs.decode(theirs(letters).input_ids) == letters and theirs.eos_token_id == len(letters)


def test_settings_without_a_counterpart_are_refused_with_the_list(tmp_path):
    run = untrained(tmp_path, position="alibi", qk_norm=True)
    with pytest.raises(Mistake) as caught:
        export.main([str(run.path), str(tmp_path / "out")])
    families = "gpt2, gpt_neox, llama, mistral, qwen2, qwen3"
    assert f"no family of transformers that we write ({families}) is this model: model.position = 'alibi' is no" in str(caught.value)
    assert "; model.qk_norm = True is no" in str(caught.value) and not (tmp_path / "out").exists()


def test_weights_of_another_model_than_the_settings_are_refused(tmp_path):
    with pytest.raises(Mistake, match="holds no tensor embedding.weight"):
        export.main([str(untrained(tmp_path).path), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["runs"]
