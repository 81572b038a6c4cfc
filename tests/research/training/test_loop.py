"""The files, the output and the numbers of a finished run, compared with a dense fp64 model that shares no code with it."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from models.config import GPT
from parallel.checkpoint.folder import latest
from parallel.checkpoint.reader import Reader
from research import __main__ as research_main
from research.config import serialization
from research.tracking.acquire_lock import is_held
from research.tracking.format import one_line
from tests.models.helpers import reference
from tests.parallel.helpers.checkpoints import by_another_reader
from tests.research.end_to_end.test_launchers import assert_same_experiment
from tests.research.helpers.launches import ROOT, Ended, Place, run
from tests.research.tracking.test_tracker import inspected, of

STEPS, TOKENS_PER_STEP, BATCH = 6, 256, 8
TRAIN = {"train/loss", "train/ppl", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/step_ms", "perf/data_ms"}
TRAIN |= {"perf/memory_mb", "mem/host_mb", "mem/host_added_mb", "mem/host_added_peak_mb"}
VALIDATION = {"val/loss", "val/ppl", "val/bits_per_byte", "val/tokens"}
PROGRESS = {"progress/step", "progress/tokens", "progress/samples", "progress/applied_steps", "progress/seconds"}
LABELS = [
    "starting",
    "gpt_sotu",
    "config",
    "machine",
    "layout",
    "batch",
    "model",
    "data",
    "tracking",
    "",
    "step",
    *"123",
    "val",
    *"456",
    "val",
]
ENDING = ["saved", "done", "sample", "next", "wandb", "python"]
DEEPSPEED_SAYS = re.compile(r"^\[[\d :,-]+\] \[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py:")
LAYOUTS = ["alone", "tensor_2", "pipe_2", "data_2"]


@pytest.fixture(params=LAYOUTS)
def ended(request) -> Ended:
    """The run on each layout."""
    return request.getfixturevalue(request.param)


def test_every_file_of_a_finished_run(ended: Ended) -> None:
    folder = ended.folder
    made = {path.name for path in folder.path.iterdir()} - {"wandb", "wandb.json"}
    assert made == {
        "run.json", "config.json", "deepspeed.json", "metrics.jsonl", "samples.jsonl", "loss.png", "source", "checkpoints", "logs", "lock",
        "made_here",
    }  # fmt: skip
    assert is_held(folder.lock) is False
    assert (folder.path.parent / "latest").is_symlink()
    assert folder.loss_png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["latest", "step_000006"]
    world = 1 if "1 node × 1 rank" in ended.out else 2
    assert sorted(path.name for path in folder.logs.iterdir()) == [f"rank_{rank}.txt" for rank in range(world)]
    original = (ROOT / "experiments/gpt_sotu/config.py").read_bytes()
    assert (folder.source / "config.py").read_bytes() == original
    assert (folder.source / "SHA256SUMS").read_text() == f"{hashlib.sha256(original).hexdigest()}  config.py\n"


def test_what_run_json_and_config_json_say(tensor_2: Ended, place: Place) -> None:
    told = json.loads(tensor_2.folder.run.read_text())
    assert (told["status"], told["precision"], told["steps"]) == ("finished", "fp32", 6)
    assert told["layout"] == "pipe 1 × data 1 × tensor 2 · ZeRO-1"
    assert ["parallel.tensor", "1", "2"] in told["overrides"]
    saved = json.loads(tensor_2.folder.config.read_text())
    assert saved["schema"] == serialization.SCHEMA
    assert saved["model"]["hidden_size"] == 32 and saved["parallel"]["tensor"] == 2 and saved["data"]["train"] == str(place.train)
    assert serialization.resolved(serialization.load(tensor_2.folder.config)) == saved


def test_deepspeed_json_is_what_the_settings_mean(data_2: Ended) -> None:
    derived = json.loads(data_2.folder.deepspeed.read_text())
    assert derived["train_micro_batch_size_per_gpu"] == 2
    assert derived["gradient_accumulation_steps"] == 2
    assert derived["zero_optimization"]["stage"] == 1
    assert derived["gradient_clipping"] == 1.0


def test_the_keys_of_every_row(ended: Ended) -> None:
    trained, validated = ended.rows("train/loss"), ended.rows("val/loss")
    assert all(set(row) == TRAIN | PROGRESS for row in trained)
    assert all(set(row) == VALIDATION | PROGRESS for row in validated)
    assert [row["progress/step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["progress/step"] for row in validated] == [3, 6]
    for row in trained + validated:
        step = row["progress/step"]
        assert row["progress/tokens"] == step * TOKENS_PER_STEP
        assert row["progress/samples"] == step * BATCH
        assert row["progress/applied_steps"] == step
    seconds = ended.column("progress/seconds")
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] < ended.seconds
    for row in trained:
        assert row["train/ppl"] == pytest.approx(math.exp(row["train/loss"]))
        assert 1 < row["perf/memory_mb"] < 1e5 and row["perf/tokens_per_second"] > 0
        assert row["perf/tokens_per_second"] * row["perf/step_ms"] == pytest.approx(1e3 * TOKENS_PER_STEP)
        assert 0 < row["perf/data_ms"] < row["perf/step_ms"]
        assert 0 < row["mem/host_mb"] <= row["perf/memory_mb"]
        assert row["mem/host_added_mb"] <= row["mem/host_added_peak_mb"] < row["perf/memory_mb"] / 2, "the libraries are not the run's"


def test_the_learning_rate_of_every_step(alone: Ended) -> None:
    """3e-3 after two steps of warm-up, then half a cosine to 3e-4 at the last."""
    cosine = [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    assert alone.column("train/lr") == pytest.approx([1.5e-3, *cosine])


def test_what_is_read_in_a_pipe(alone: Ended) -> None:
    lines = alone.out.splitlines()
    prepared = [line for line in lines if line.startswith(("training ", "tokenizing ")) and line.endswith(" …")]
    labels = [line.split()[0] if line else "" for line in lines if line not in prepared]
    assert labels == LABELS + ENDING
    assert lines.pop(0) == "starting gpt_sotu on 1 rank …"
    assert len(prepared) == 3
    assert "\x1b" not in alone.out and "\r" not in alone.out
    assert re.match(r"gpt_sotu · run gpt_sotu-[0-9a-f]{6} · (unknown|[0-9a-f]{7,}) \((clean|dirty)\) · \S+$", lines[0])
    assert re.match(r"config   experiments/gpt_sotu \+ \d+ overrides: model.num_layers 4 → 2, model.hidden_size 192 → 32, ", lines[1])
    assert "batch    8 sequences = 2 micro × 4 accumulated × 1 data · 256 tokens a step" in lines
    assert "model    gpt 2 layers, hidden 32, 2 heads · 30.7 k parameters" in lines
    ending = re.compile(r"done   6 steps in .* at step 6 · 0 skipped · [\d,.]+ [MG]B of memory, [\d,.]+ [MG]B added by the run · loss.png")
    assert any(ending.fullmatch(line) for line in lines)


def test_plain_python_writes_nothing_to_standard_error(alone: Ended) -> None:
    assert alone.err == ""


def test_two_tasks_of_srun_say_it_once(data_2: Ended) -> None:
    assert data_2.err == ""
    assert data_2.out.count("gpt_sotu · run") == 1


def test_deepspeed_adds_its_launchers_lines_only(tensor_2: Ended) -> None:
    assert tensor_2.err == ""
    ours = [line for line in tensor_2.out.splitlines() if not DEEPSPEED_SAYS.match(line)]
    assert [line.split()[0] if line else "" for line in ours] == [label for label in LABELS + ENDING if label != "wandb"]
    assert ours[0] == "starting gpt_sotu on 2 ranks …" and ours[1].startswith("gpt_sotu · run ")


def test_torchrun_adds_its_note_on_threads_only(pipe_2: Ended) -> None:
    assert pipe_2.out.startswith("starting gpt_sotu on 2 ranks …\ngpt_sotu · run ")
    assert all("torch/distributed/run.py" in line for line in pipe_2.err.splitlines())


def test_the_last_validation_is_what_a_dense_model_finds(ended: Ended, place: Place) -> None:
    """Σ nats / (ln 2 · bytes) over every token but the first, from the checkpoint's files, in fp64, without code of ours."""
    assert_validated(ended, place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout", "bound"),
    [(1, {}, 203), (2, {"parallel__tensor": 2}, 203), (2, {"parallel__pipe": 2}, 203), (2, {}, 203), (1, {}, 1), (1, {}, 10**6)],
)
def test_a_bounded_validation_is_what_a_dense_model_finds_on_the_first_tokens(place: Place, ranks: int, layout: dict, bound: int) -> None:
    """The same, trained with smoothed labels, which are no part of a validation. 203 tokens fill six windows and a part."""
    ended = run(place, "torchrun", ranks, schedule__validate_tokens=bound, optimizer__label_smoothing=0.1, **layout)
    assert ended.code == 0, ended.err
    assert_validated(ended, place, bound)
    assert ("(of which the first " in ended.out) == (bound < 10**6)


def assert_validated(ended: Ended, place: Place, bound: int = 10**9) -> None:
    nats, tokens, num_bytes = dense_evaluation(ended, place, bound)
    first, last = ended.rows("val/loss")
    assert first["val/tokens"] == last["val/tokens"] == tokens
    assert last["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert last["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert last["val/ppl"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def dense_evaluation(ended: Ended, place: Place, bound: int) -> tuple[float, int, int]:
    """(Σ nats, tokens predicted, bytes of the text up to the last of them); at most `bound` tokens."""
    weights = weights_of(ended.folder.checkpoints / "step_000006")
    (table,) = (place.path / "cache").glob("bpe-384-*.json")
    words = tokenizers.Tokenizer.from_file(str(table))
    texts = [json.loads(line)["text"] for line in place.validation.read_text().splitlines()]
    end = words.token_to_id("<|endoftext|>")
    tokens = [i for text in texts for i in [*words.encode(text).ids, end]][: bound + 1]
    num_bytes = sum(len(words.id_to_token(i)) for i in tokens if i != end)  # a letter of a byte-level token is a byte
    stream, length = torch.tensor(tokens), 32
    nats = 0.0
    for start in range(0, len(stream) - 1, length):
        ids, targets = stream[start : start + length], stream[start + 1 : start + 1 + length]
        log_p = dense_logits(ids[: len(targets)], weights).log_softmax(-1)
        nats -= float(log_p[torch.arange(len(targets)), targets].sum())
    return nats, len(stream) - 1, num_bytes


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weight).double() for name, weight in by_another_reader(folder)["weights"].items()}


def dense_logits(ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """GPT-2's equations with exact gelu; 's' -> 's v'."""
    shape = GPT(
        num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=2, ffn_size=64, vocab_size=391, seq_length=32, norm="layernorm",
        norm_eps=1e-5, position="learned", mlp="gelu", residual="pre_norm", init="gpt2", bias=True, qkv_bias=True, qk_norm=False, tied=True,
        embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    x = (weights["embedding.weight"][ids] + weights["position.weight"][: len(ids)])[None]
    for block in ("blocks.0", "blocks.1"):
        x = x + reference.attention(reference.norm(x, weights, f"{block}.attention_norm", shape), weights, f"{block}.attention", shape)
        x = x + reference.mlp(reference.norm(x, weights, f"{block}.mlp_norm", shape), weights, f"{block}.mlp", gelu)
    return (reference.norm(x, weights, "final_norm", shape) @ weights["embedding.weight"].T)[0]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_the_checkpoint_is_whole_and_says_where_it_comes_from(ended: Ended) -> None:
    with Reader(latest(ended.folder.checkpoints)) as reader:
        reader.check()
    told = {key: reader.facts[key] for key in ("step", "samples", "tokens", "applied_steps")}
    assert told == {"step": 6, "samples": 48, "tokens": 1536, "applied_steps": 6}
    assert reader.facts["layout"]["precision"] == "fp32" and reader.facts["machine"]["threads"] >= 1
    assert reader.tensors["embedding.weight"].shape == (391, 32) and set(reader.manifest.tensors) == {"weights", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    "ended", ["tensor_2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tensor_2")], indirect=True
)
def test_generate_writes_what_the_run_wrote(ended: Ended, capsys) -> None:
    """`python -m research generate`, in one process, from a checkpoint of any layout."""
    (row,) = [json.loads(line) for line in ended.folder.samples.read_text().splitlines()]
    assert (row["progress/step"], row["progress/tokens"]) == (6, 1536)
    assert len(row["text"]) > 20, "a sample of nothing compares nothing"
    assert f"sample {row['prompt']} ▸ {one_line(row['text'])}\n" in ended.out
    chosen = serialization.load(ended.folder.config).sample
    asked = ["--temperature", str(chosen.temperature), "--top_p", str(chosen.top_p)]
    assert research_main.main(["generate", str(ended.folder.path), "--prompt", row["prompt"], *asked]) == 0
    written = capsys.readouterr().out
    assert written.startswith(row["prompt"])
    assert one_line(written.removeprefix(row["prompt"])) == one_line(row["text"])


def test_runs_lists_it(tensor_2: Ended, place: Place) -> None:
    command = [sys.executable, "-m", "research", "runs", "--root", str(place.runs)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    head, *lines = [line.split("\t") for line in listed.splitlines()]
    (line,) = [dict(zip(head, line, strict=True)) for line in lines if line[0] == tensor_2.folder.title]
    bits = f"{tensor_2.column('val/bits_per_byte')[-1]:.3f}"
    assert (line["steps"], line["bits/byte"], line["status"], line["precision"]) == ("6/6", bits, "finished", "fp32")
    assert line["layout"] == "pipe 1 × data 1 × tensor 2 · ZeRO-1" and "model.num_layers 4 → 2" in line["differs"]


def test_what_to_type_next_can_be_typed(alone: Ended) -> None:
    """`next` names this run's folder. The line for a dashboard appears if there is something to see."""
    following = alone.out[alone.out.index("\nnext ") :]
    assert f"python -m research generate {alone.folder.path} --prompt '" in following
    assert f"wandb leet {alone.folder.wandb}\n" in following and alone.folder.wandb.is_dir()


def test_an_unreachable_server_costs_nothing_but_the_mirror(alone: Ended, place: Place) -> None:
    """The exit code is 0, and the offline run has every row, the whole configuration and our axes."""
    assert alone.code == 0
    assert "\ntracking W&B offline (no answer from http://127.0.0.1:9) · later: wandb sync " in alone.out
    records = inspected(alone.folder)
    rows = [{key: value for key, value in row["item"].items() if not key.startswith("_")} for row in of(records, "history")]
    written = [json.loads(line) for line in alone.folder.metrics.read_text().splitlines()]
    *rows, sample, table, picture = rows
    assert rows == written and len(written) == STEPS + 2 and table["samples.path"].endswith(".table.json")
    assert picture["loss_curve.size"] == alone.folder.loss_png.stat().st_size
    assert one_line(sample["sample/text"]) in alone.out
    (about,) = of(records, "run")
    assert about["job_type"] == "train"
    saved, told = json.loads(alone.folder.config.read_text()), about["config"]["update"]
    assert {key: told[key] for key in saved} == saved
    assert told["derived_deepspeed"] == json.loads(alone.folder.deepspeed.read_text())
    assert (about["run_group"], about["run_id"]) == ("gpt_sotu", alone.folder.title)
    assert about["tags"] == ["pipe 1 × data 1 × tensor 1", "ZeRO-1", "fp32"]
    stores, (checkpoint,) = ([one for one in of(records, "artifact") if one["type"] == kind] for kind in ("dataset", "model"))
    assert [json.loads(store["metadata"])["source"] for store in stores] == [str(place.train), str(place.validation)]
    assert "step_000006" in checkpoint["aliases"] and of(records, "alert") == []
    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in of(records, "metric")}
    assert axes["train/*"] == axes["val/*"] == "progress/tokens" and axes["perf/*"] == axes["mem/*"] == "progress/step"


@pytest.mark.slow
def test_an_experiment_in_code_is_the_same_on_every_layout(place: Place, elsewhere) -> None:
    """gpt_sotu_dyt, whose variant.py replaces the norms, on tensor ranks and on one rank."""
    single = run(place, "python", 1, "gpt_sotu_dyt")
    double = run(place, "deepspeed", 2, "gpt_sotu_dyt", elsewhere, parallel__tensor=2)
    assert "parameters counted once built (variant.py)" in single.out
    assert (double.folder.source / "variant.py").read_bytes() == (ROOT / "experiments/gpt_sotu_dyt/variant.py").read_bytes()
    assert_same_experiment(single, single)
    assert_same_experiment(double, single)


@pytest.mark.slow
def test_generate_in_a_process_of_its_own(tensor_2: Ended) -> None:
    """As a person types it, from the repository."""
    command = [sys.executable, "-m", "research", "generate", str(tensor_2.folder.path), "--prompt", "the people", "--max_new_tokens", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the people") and len(done.stdout.split()) > 4
