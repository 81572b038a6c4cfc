"""benchmarks/gpu.py, as far as a machine without a GPU can run it: so that a GPU's minutes are not spent on its mistakes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from research import ROOT
from research.cluster.environment import environment
from research.cluster.forked_ranks import CPU


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    with environment(CPU):
        return subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu.py"), *arguments], capture_output=True, text=True, timeout=900)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mine.json").read_text())["sections"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "no GPU: not run\n") and not list(tmp_path.iterdir())


def test_an_unknown_section_is_named_with_those_there_are() -> None:
    done = run("--sections", "precision,speeed")
    assert done.returncode == 2 and "there is no section 'speeed' → use collectives, precision, zero" in done.stderr


@pytest.mark.slow
def test_its_sections_hold_on_a_cpu_and_are_not_run_twice(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--results", str(tmp_path), "--name", "mine", "--minutes", "14")
    done = run("--sections", "collectives,checkpoint,generation,kernels", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = record_of(tmp_path)
    assert {name: section["status"] for name, section in sections.items()} == {
        "collectives": "ok", "checkpoint": "ok", "generation": "ok", "kernels": "skipped"
    }  # fmt: skip
    assert len(sections["checkpoint"]["checks"]) == 4 and all(check["holds"] for check in sections["checkpoint"]["checks"])
    again = run("--sections", "checkpoint", *options)
    assert again.returncode == 0 and "checkpoint …" not in again.stdout and record_of(tmp_path) == sections


@pytest.mark.parametrize(
    ("section", "status", "error"),
    [
        (lambda bench: bench.check("equal", True), "ok", None),
        (lambda bench: bench.check("difference", float("nan"), 1.0), "wrong", None),
        (lambda bench: bench.check("equal", False), "wrong", None),
        (lambda bench: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
        (lambda bench: bench.needs_cuda(), "skipped", "needs CUDA"),
    ],
)
def test_a_section_that_fails_is_recorded_and_ends_nothing_else(section, status: str, error: str | None, tmp_path: Path) -> None:
    gpu = loaded("gpu")
    gpu.SECTIONS["mine"] = section
    record = gpu.run_section("mine", gpu.Bench("cpu", tmp_path, 0.0))
    assert (record["status"], record["error"]) == (status, error)


@pytest.mark.slow
def test_a_task_that_raises_and_a_process_that_dies(tmp_path: Path) -> None:
    gpu = loaded("gpu")
    bench = gpu.Bench("cpu", tmp_path, gpu.time.monotonic() + 300)
    bad, fine = bench.run({"task": "train", "precision": "fp12"}, {"task": "machine"})
    assert "fp12" in bad["error"] and fine["device"] == "cpu"
    with pytest.raises(gpu.Failed, match="fp12"):
        gpu.good([bad, fine])
    with pytest.raises(gpu.Failed, match="exit code 1(.|\n)*KeyError"):
        bench.run({"no task": 1}, on="cpu")


def test_the_largest_difference_is_not_hidden_by_a_nan_or_a_loss_that_is_missing() -> None:
    difference = loaded("gpu").difference
    assert difference([1.0, 2.0], [1.0, 2.5]) == 0.5 and difference([1.0], [1.0, 2.0]) == float("inf")
    assert not difference([1.0, float("nan")], [1.0, 2.0]) <= 1e9 and not difference([], [1.0]) <= 1e9


def test_pauses_between_kernels_and_time_of_each() -> None:
    """Two streams overlap from 2 to 3: only 4 to 10 is idle of 0 to 12."""
    found = loaded("gpu_worker").timeline([(10.0, 12.0, "c"), (0.0, 3.0, "a"), (2.0, 4.0, "b"), (3.5, 3.8, "a")], steps=2)
    assert found["busy"] == round(6 / 12, 4) and found["kernels per step"] == 2.0
    assert found["longest pauses"] == [{"us": 6.0, "after": "b", "before": "c"}]
    assert list(found["most time, us per step"].items())[0][0] == "a"


def test_speed_is_compared_with_the_peak_and_a_size_that_fails_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = loaded("gpu")
    one = {"tokens_per_second": 1e5, "seconds_per_step": 0.2, "parameters": 124_000_000, "loss": [11.0, 9.0]}
    one |= {"peak_allocated_mb": 1.0, "peak_reserved_mb": 2.0, "allocation_retries": 0}
    monkeypatch.setattr(gpu.Bench, "run", lambda self, *tasks, on="": [{"name": "NVIDIA H200"}, one, {"error": "out of memory"}])
    bench = gpu.Bench("cuda", tmp_path, 0.0)
    gpu.speed(bench)
    flops = 6 * 124e6 + 12 * 12 * 768 * 1024
    assert bench.figures["micro-batch 8"]["mfu"] == pytest.approx(flops * 1e5 / 989e12)
    assert bench.figures["micro-batch 32"] == {"error": "out of memory"} and [check["holds"] for check in bench.checks] == [True, False]
