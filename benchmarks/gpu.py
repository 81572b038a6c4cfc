"""Does Tessera compute on a GPU what it computes on a CPU, and how fast? At most 8 minutes on one GPU; without one it does nothing.

    python benchmarks/gpu.py [--sections precision,zero] [--name my_gpu] [--again] [--minutes 8]

Each section is a question with checks and figures. Small models are trained on the GPU and on the CPU of the same machine and compared;
GPT-2's shape (124 M parameters) is trained on the GPU for the speed. Every training is a process of its own (benchmarks/gpu_worker.py), so
a section that fails, with whatever error, is recorded and the others still run.

The record is benchmarks/results/NAME.json, written after every section. A second call runs only what the record lacks or what
failed; --again runs all. The exit code is 1 if a check did not hold or a section failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.errors import Mistake, listed
from parallel.files import read_json, write_json
from research import ROOT
from research.cli.verbs import count
from research.cluster.environment import environment, git_state
from research.cluster.exit_codes import refusing
from research.cluster.forked_ranks import CPU

RESULTS = ROOT / "benchmarks" / "results"
WORKER = ROOT / "benchmarks" / "gpu_worker.py"
TOLERANCES = {"fp32": 2e-4, "bf16": 3e-2, "fp16": 1e-2}
"""The largest difference of a loss (nats per token, about 6.9 at first) from that of the CPU in fp32, over 20 steps."""
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "A10": 125, "L4": 121}
"""A word of a GPU's name -> its dense bf16 peak in TFLOPS, from the data sheets. Of other GPUs no utilisation is computed."""


class Failed(Exception):
    """A task ended with an error, or not at all."""


class NeedsCuda(Exception):
    """A section has nothing to do on a CPU."""


@dataclass
class Bench:
    """What a section works with: it runs tasks, and notes checks and figures."""

    device: str
    """cuda, or cpu to try the program itself."""
    folder: Path
    deadline: float
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self, *tasks: dict[str, Any], on: str = "") -> list[dict[str, Any]]:
        """What tasks of benchmarks/gpu_worker.py found, one after the other in one process on `on` (default: the device).

        A task that failed has found {"error": traceback}.
        """
        path = self.folder / "tasks.json"
        path.write_text(json.dumps(tasks))
        with environment(CPU if (on or self.device) == "cpu" else {}):
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        try:
            said, _ = process.communicate(timeout=max(5.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failed("the time was over") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise Failed(f"exit code {process.returncode}\n{said[-3000:]}")
        return json.loads(path.read_text())

    def check(self, what: str, value: float | bool, limit: float | None = None) -> None:
        """Notes whether `value` is true, or at most `limit`."""
        holds = bool(value) if limit is None else value <= limit  # NaN does not hold
        self.checks.append({"what": what, "value": value, "limit": limit, "holds": holds})

    def needs_cuda(self) -> None:
        """Leaves a section that a CPU cannot run."""
        if self.device == "cpu":
            raise NeedsCuda


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference of two lists of losses; inf if they have different lengths, nan if there is one."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=False)]
    return float("inf") if len(a) != len(b) else sum(differences) if any(d != d for d in differences) else max(differences)


def good(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, if no task failed."""
    for one in found:
        if "error" in one:
            raise Failed(one["error"])
    return list(found)


def losses(found: dict[str, Any]) -> list[float]:
    """The losses of a training; none if it failed."""
    return found.get("loss", [])


def training(**arguments: Any) -> dict[str, Any]:
    """The task of training a small model."""
    return {"task": "train", **arguments}


def collectives(bench: Bench) -> None:
    """A world of one rank on NCCL: every collective of ours returns what it was given, objects and flags on the host too."""
    (found,) = good(bench.run({"task": "collectives"}))
    bench.figures |= {"backend": found.pop("backend"), "device": found.pop("device")}
    for name, holds in found.items():
        bench.check(name, holds)


def precision(bench: Bench) -> None:
    """20 steps in fp32, bf16 and fp16: the losses of the CPU in fp32, within the rounding of each. Dropout has the CPU's masks."""
    dropped = {"mlp_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    grouped = {"num_kv_heads": 2, "position": "rotary", "rotary_fraction": 1.0, "rotary_base": 10000.0, "rotary_scaling": "none"}
    both = {
        "fp32": training(),
        "dropout": training(steps=5, settings=dropped),
        "grouped queries, rotary positions": training(steps=5, settings=grouped),
    }
    low = ["bf16", "fp16"] if bench.device == "cuda" else ["bf16"]  # a CPU has no fp16 kernels
    there = good(bench.run(*both.values(), on="cpu"))
    here = bench.run(*both.values(), *(training(precision=name) for name in low))
    bench.figures["fp32 on the CPU"] = reference = there[0]["loss"]
    bench.check("the loss falls", reference[-1], reference[0] - 0.1)
    compared = {name: (found, other["loss"], "fp32") for name, found, other in zip(both, here, there, strict=False)}
    compared |= {name: (found, reference, name) for name, found in zip(low, here[len(both) :], strict=True)}
    for name, (found, expected, tolerance) in compared.items():
        bench.figures[name] = found.get("error", losses(found))
        bench.check(f"{name}: largest difference of a loss", difference(losses(found), expected), TOLERANCES[tolerance])


def zero(bench: Bench) -> None:
    """ZeRO 1, 2 and 3, with and without offload: the same losses. On a GPU communication overlaps, with contiguous gradients."""
    (reference,) = good(bench.run(training(steps=8), on="cpu"))
    kinds = {f"ZeRO-{stage}": training(steps=8, zero=stage) for stage in (1, 2, 3)}
    kinds |= {f"ZeRO-{stage} with offload": training(steps=8, zero=stage, offload=True) for stage in (2, 3)}
    for name, found in zip(kinds, bench.run(*kinds.values()), strict=True):
        bench.figures[name] = found.get("error", losses(found))
        bench.check(f"{name}: largest difference of a loss", difference(losses(found), reference["loss"]), TOLERANCES["fp32"])


def checkpoint(bench: Bench) -> None:
    """A checkpoint of one device is loaded by the other: the same weights to the bit, and the losses of a run that never stopped."""
    from_cpu, from_device = (str(bench.folder / origin / "step_000004") for origin in ("cpu", "device"))
    whole, cpu = good(bench.run(training(steps=8), training(steps=4, save=from_cpu), on="cpu"))
    device, loaded_here = good(bench.run(training(steps=4, save=from_device), training(steps=8, load=from_cpu)))
    (loaded_there,) = good(bench.run(training(steps=8, load=from_device), on="cpu"))
    for name, begun, found in (("CPU → device", cpu, loaded_here), ("device → CPU", device, loaded_there)):
        bench.check(f"{name}: the weights are equal", found["loaded"] == begun["weights"])
        bench.check(f"{name}: largest difference of a loss", difference(begun["loss"] + found["loss"], whole["loss"]), TOLERANCES["fp32"])


def generation(bench: Bench) -> None:
    """Greedy decoding with a KV cache writes the tokens that the CPU writes; tokens per second of GPT-2's shape in bf16."""
    (there,) = good(bench.run({"task": "generate"}, on="cpu"))
    many = [{"task": "generate", "small": False, "precision": "bf16", "prompts": prompts, "tokens": 128} for prompts in (1, 1, 32)]
    here, *fast = good(bench.run({"task": "generate"}, *(many if bench.device == "cuda" else [])))
    bench.check("tokens are equal", here["ids"] == there["ids"])
    for task, found in zip(many[1:], fast[1:], strict=False):  # the first of them warms up
        bench.figures[f"tokens per second, {task['prompts']} at once"] = found["tokens_per_second"]


def determinism(bench: Bench) -> None:
    """With `deterministic` two runs are equal to the bit, and so is one that was resumed; whether they are without it is noted."""
    for name in ("fp32", "bf16"):
        same: dict[str, Any] = {"precision": name, "steps": 8}
        fixed = same | {"deterministic": True}
        folder = str(bench.folder / f"deterministic_{name}" / "step_000004")
        whole, _ = good(bench.run(training(**fixed), training(**fixed | {"steps": 4}, save=folder)))
        again, resumed = good(bench.run(training(**fixed), training(**fixed, load=folder)))
        bench.check(f"{name}: two runs are equal to the bit", (whole["loss"], whole["weights"]) == (again["loss"], again["weights"]))
        bench.check(f"{name}: resumed, equal to the bit", resumed["weights"] == whole["weights"])
        first, second = good(bench.run(training(**same), training(**same)))
        bench.figures[f"{name}: equal without the setting"] = first["weights"] == second["weights"]


def speed(bench: Bench) -> None:
    """Tokens per second, the share of the GPU's peak, and the peak memory of GPT-2's shape in bf16."""
    bench.needs_cuda()
    sizes = (8, 32)
    trainings = [training(precision="bf16", small=False, steps=20, size=size, micro_batches=2) for size in sizes]
    machine, *found = bench.run({"task": "machine"}, *trainings)
    peak = next((peak for word, peak in PEAK_TFLOPS.items() if word in machine["name"]), None)
    for size, one in zip(sizes, found, strict=True):
        label = f"micro-batch {size}"
        if "error" in one:  # the larger one may need more memory than there is
            bench.figures[label] = one
            bench.check(f"{label}: it runs", False)
            continue
        # 6 per parameter and token, and 12 · layers · hidden · sequence for the attention (arXiv:2204.02311, appendix B)
        tflops = (6 * one["parameters"] + 12 * 12 * 768 * 1024) * one["tokens_per_second"] / 1e12
        kept = ("tokens_per_second", "seconds_per_step", "parameters", "peak_allocated_mb", "peak_reserved_mb", "allocation_retries")
        bench.figures[label] = {key: one[key] for key in kept} | {"tflops": tflops} | ({"mfu": tflops / peak} if peak else {})
        bench.check(f"{label}: the loss falls", one["loss"][-1], one["loss"][0] - 0.1)


def kernels(bench: Bench) -> None:
    """Where the time of a step goes: kernels, pauses between them, and the points at which the host waits for the GPU."""
    bench.needs_cuda()
    (found,) = good(bench.run({"task": "profile"}))
    bench.figures |= found


SECTIONS: dict[str, Callable[[Bench], None]] = {
    section.__name__: section for section in (collectives, precision, zero, checkpoint, generation, determinism, speed, kernels)
}


def run_section(name: str, bench: Bench) -> dict[str, Any]:
    """The record of a section: ok, wrong (a check does not hold), failed (an error), or skipped."""
    began, status, error = time.monotonic(), "ok", None
    try:
        SECTIONS[name](bench)
    except NeedsCuda:
        status = "ok" if bench.checks else "skipped"
        error = "the rest needs CUDA" if bench.checks else "needs CUDA"
    except Exception as raised:  # whatever it is, the other sections still run
        status, error = "failed", f"{type(raised).__name__}: {raised}"
    if status == "ok" and not all(check["holds"] for check in bench.checks):
        status = "wrong"
    record = {"status": status, "seconds": round(time.monotonic() - began, 1), "checks": bench.checks, "figures": bench.figures}
    return {**record, "error": error}


def chosen_sections(text: str) -> list[str]:
    """The sections that `--sections` names, in their order; all if it names none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise Mistake(f"--sections: there is no section {unknown[0]!r} → use {listed(SECTIONS, 'or')}")
    return [name for name in SECTIONS if not names or name in names]


def show(name: str, record: dict[str, Any]) -> None:
    """One line per section, and one per check that does not hold."""
    print(f"{name:<12} {record['status']:<8} {record['seconds']:6.1f} s  {len(record['checks'])} checks", flush=True)
    for check in record["checks"]:
        if not check["holds"]:
            print(f"  does not hold: {check['what']}: {check['value']}" + (f" > {check['limit']}" if check["limit"] is not None else ""))
    if record["error"]:
        print("  " + record["error"].strip().replace("\n", "\n  "))


def main() -> None:
    """Parses the arguments and runs the sections that the record lacks."""
    described = "\n".join(f"  {name:<12} {(section.__doc__ or '').splitlines()[0]}" for name, section in SECTIONS.items())
    parser = argparse.ArgumentParser(description=f"{__doc__}\nsections:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="", metavar="NAME,…", help="only these sections")
    parser.add_argument("--name", default="", help="name of the record; default: the GPU's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--again", action="store_true", help="run sections again whose record is there")
    parser.add_argument("--minutes", type=count, default=8, help="sections that are not over by then are recorded as failed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)  # cpu: to test this program
    arguments = parser.parse_args()
    sections, deadline = chosen_sections(arguments.sections), time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        machine = good(Bench(arguments.device, folder, deadline).run({"task": "machine"}))[0]
        if arguments.device == "cuda" and not machine["cuda"]:
            print("no GPU: not run")
            return
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / f"{arguments.name or machine['device'].partition(',')[0].lower().replace(' ', '_')}.json"
        record = read_json(path) if path.is_file() else {}
        done = {} if arguments.again else {name: old for name, old in record.get("sections", {}).items() if old["status"] == "ok"}
        commit, dirty = git_state(ROOT)
        record = {"machine": machine, "sections": done if arguments.sections == "" else record.get("sections", {})}
        for name in sections:
            if name not in done:
                print(f"{name} …", flush=True)
                record["sections"][name] = run_section(name, Bench(arguments.device, folder, deadline))
                record["sections"][name] |= {"commit": commit, "dirty": dirty}
                write_json(path, record)
            show(name, record["sections"][name])
    print(path)
    if any(record["sections"][name]["status"] in ("wrong", "failed") for name in sections):
        raise SystemExit(1)


if __name__ == "__main__":
    with refusing():
        main()
