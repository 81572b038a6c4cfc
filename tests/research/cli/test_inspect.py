"""What `inspect` shows of a run and a checkpoint, and that --check finds a flipped bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.errors import Mistake
from research.cli import inspect
from research.tracking.run_folder import RunFolder
from tests.research.helpers import small_runs as r
from tests.research.helpers.small_runs import Stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    ended = Stage(tmp_path_factory.mktemp("stage")).run("run", 2, parallel={"tensor": 2}, prelude=r.stopped_in_step_6)
    return ended.folder


def shown(capsys, *arguments: str) -> str:
    inspect.main(list(arguments))
    return capsys.readouterr().out


def test_a_run_and_its_newest_checkpoint(folder: RunFolder, capsys) -> None:
    said = shown(capsys, str(folder.path))
    assert said.startswith(f"{folder.title} · interrupted · pipe 1 × data 1 × tensor 2 · ZeRO-1 · fp32")
    assert "saved    step_000003 · " in said and "saved    step_000006 · " in said
    assert "step_000006 · step 6 · 768 tokens · 48 samples" in said
    assert "\nlayout   pipe 1 × data 1 × tensor 2 · ZeRO-1 · fp32 · " in said and "world 2" in said and "adam_steps 6" in said


def test_tensors_are_those_of_the_files(folder: RunFolder, capsys) -> None:
    """Counted by another reader: safetensors' own."""
    newest = folder.checkpoints / "step_000006"
    elements = sum(t.numel() for file in newest.glob("weights-*") for t in load_file(file).values())
    said = shown(capsys, str(newest), "--tensors")
    assert f"{elements / 1e3:.1f} k elements × weights, exp_avg, exp_avg_sq" in said
    assert "embedding.weight" in said and "391 × 32  2 pieces" in said
    assert torch.Size([391, 32]).numel() < elements


def test_check_passes_what_is_whole_and_names_what_is_not(folder: RunFolder, tmp_path: Path, capsys) -> None:
    assert "step_000003: 3 files as written" in shown(capsys, str(folder.path), "--check").replace("7 files", "3 files")
    copy = tmp_path / "x" / "checkpoints" / "step_000006"
    shutil.copytree(folder.checkpoints / "step_000006", copy)
    file = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        inspect.main([str(copy), "--check"])
    assert left.value.code == 1
    assert f"{file.name} is damaged: SHA-256" in capsys.readouterr().out


def test_nothing_to_inspect_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="there is no run folder"):
        inspect.main([str(tmp_path)])
