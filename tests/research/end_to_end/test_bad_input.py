"""Bad input in real launches: one sentence, printed once, exit code 2 through the launcher, no traceback.

What a single function refuses is tested with that function: config/test_checks.py, test_schema.py, test_overrides.py, data/.
"""

import contextlib
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from deepspeed.accelerator import get_accelerator

from parallel.engines.engine import refuse_precision
from research.data.token_store import TokenStore
from tests.research.end_to_end.test_launch_errors import LAUNCH, launch, slow
from tests.research.helpers.example import sentence
from tests.research.helpers.launches import ROOT, Ended, Place, run, slurm


def assert_refused(ended: Ended) -> str:
    """Exit code 2 and one line on standard error, rank 0's; returns it."""
    assert ended.code == 2, ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error  ") and " → " in lines[0], ended.err
    assert "(rank" not in lines[0]
    assert "Traceback" not in ended.out
    return lines[0]


@contextlib.contextmanager
def occupied():
    """A port on which another process listens."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.slow
def test_a_taken_port_through_deepspeed(place: Place) -> None:
    with occupied() as port:
        ended = run(place, "deepspeed", 2, port=port, parallel__tensor=2)
    said = assert_refused(ended)
    assert said == f"error  master port {port} cannot be used (Address already in use) → add `--master_port N` with a free port"
    assert ended.run is None


def test_a_taken_port_through_srun() -> None:
    """Rank 0, which would serve the others, reports it."""
    with occupied() as port:
        done = launch("--parallel.tensor", "2", **slurm(0, 2, port))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error  master port {port} cannot be used") and "`MASTER_PORT=N`" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_world_that_does_not_fit_through_deepspeed(place: Place, elsewhere) -> None:
    said = assert_refused(run(place, "deepspeed", 2, "gpt_sotu_3d", elsewhere))
    assert said == (
        "error  parallel.pipe × parallel.tensor = 2 × 2 = 4 needs 4 ranks, the world has 2 → add `--num_gpus 4` to the deepspeed command"
    )


@pytest.mark.slow
def test_a_corpus_of_nothing_through_deepspeed(place: Place, tmp_path) -> None:
    """It has lines, so that it is found empty only when it is read: by both ranks, after they are connected."""
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text('{"text": ""}\n' * 3)
    ended = run(place, "deepspeed", 2, data__train=nothing, parallel__tensor=2)
    assert f"{nothing} holds no text" in assert_refused(ended)
    assert ended.run is None


@pytest.mark.slow
def test_a_token_outside_of_the_vocabulary(place: Place, alone: Ended, tmp_path) -> None:
    """In a store of another program, of which no tokenizer has checked the ids; and in the cache, whose stores are made again."""
    cache = tmp_path / "cache"
    shutil.copytree(place.path / "cache", cache)
    (file,) = cache.glob("*train.txt-*.bin")
    (tokenizer,) = cache.glob("bpe-*.json")
    tokens = np.fromfile(file, "<u2")
    right = tokens[1000]
    tokens[1000] = 391
    tokens.tofile(file)
    assert TokenStore(file.with_suffix("")).tokens[1000] == 391
    for suffix in (".bin", ".idx"):
        shutil.copy(file.with_suffix(suffix), tmp_path / f"foreign{suffix}")
    said = assert_refused(run(place, data__cache=cache, data__train=f"store:{tmp_path}/foreign", data__tokenizer=tokenizer))
    assert "391" in said and "1000" in said.replace(",", "") and "data.tokenizer" in said

    ended = run(place, data__cache=cache)
    assert ended.code == 0 and ended.column("train/loss") == alone.column("train/loss"), ended.err
    assert TokenStore(file.with_suffix("")).tokens[1000] == right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.validation": "empty.txt"}, "is empty"),
        ({"parallel.zero_stage": "2", "parallel.pipe": "2"}, "parallel.zero_stage = 2 does not work with parallel.pipe = 2"),
        slow({"data.train": "missing.txt"}, "data.train = 'missing.txt'"),
        slow({"schedule.batch_size": "7"}, "schedule.batch_size = 7 is not a multiple of"),
        slow({"parallel.pipe": "5"}, "parallel.pipe = 5 leaves stages without a block of model.num_layers = 4"),
        slow({"model.num_layers": "0"}, "model.num_layers = 0 does not work"),
        slow({"schedule.steps": "-1"}, "schedule.steps = -1 does not work"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, str], words: str, tmp_path) -> None:
    (tmp_path / "empty.txt").touch()
    argv = [str(tmp_path / value) if value == "empty.txt" else value for pair in changes.items() for value in (f"--{pair[0]}", pair[1])]
    done = launch(*argv, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error  ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_fp16_where_the_device_has_none(monkeypatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    assert sentence(lambda: refuse_precision("fp16")) == (
        "precision = 'fp16' needs fp16 kernels, which this device (cpu) has not → use 'bf16' or 'fp32'"
    )
    refuse_precision("fp32")
    refuse_precision("bf16")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "deepspeed.zero_optimization.stage = 2 contradicts 1, which follows from parallel.zero_stage",
        ),
        slow({"gradient_clipping": 5.0}, "deepspeed.gradient_clipping = 5.0 contradicts optimizer.clip = 1.0 → set optimizer.clip instead"),
        slow({"bf16": {"enabled": True}}, "deepspeed.bf16 = {'enabled': True} contradicts precision"),
    ],
)
def test_a_deepspeed_table_that_contradicts_a_field(table: dict, words: str, tmp_path) -> None:
    done = launch("--dry-run", file=own_experiment(tmp_path, table), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error  {words}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("table", [{"zero_optimization": {"overlap_comm": True}}, slow({"memory_breakdown": True})])
def test_a_deepspeed_table_that_adds_or_waits_for_the_device(table: dict, tmp_path) -> None:
    """A setting that contradicts on a CPU and is the default on a GPU cannot be refused before torch knows the device."""
    done = launch("--dry-run", file=own_experiment(tmp_path, table), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def own_experiment(tree: Path, table: dict) -> Path:
    """launch.py of an experiment like gpt_sotu with a deepspeed table, in a tree of its own that links to our packages."""
    folder = tree / "experiments/mine"
    shutil.copytree(LAUNCH.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "config.py"
    file.write_text(file.read_text().replace("    seed=1,\n", f"    seed=1,\n    deepspeed={table!r},\n"))
    for package in ("research", "models", "parallel"):
        (tree / package).symlink_to(ROOT / package)
    return folder / "launch.py"
