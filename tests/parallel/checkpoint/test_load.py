"""A resumed run equals an uninterrupted one: bit for bit on the same layout, within rounding on another; damage is never loaded."""

import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch

from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.load import load_checkpoint, load_initial
from parallel.checkpoint.reader import Reader
from parallel.checkpoint.saver import Saver
from parallel.distributed import PRECISIONS
from parallel.engines import process_state
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import MOMENTS, ensure_moments, fragment
from parallel.errors import Mistake
from parallel.files import write_synced
from parallel.slices import slice_of
from tests.harness import run_ranks
from tests.parallel.engines.test_engine import DROPPING, LOSS, LOW_PRECISION_LOSS, furthest
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import all_but_slow, by_another_reader, change_manifest, save
from tests.parallel.helpers.training import LLAMA

KINDS = ("weights", *MOMENTS)
HALF, STEPS = 4, 8
"""The rate rises from step to step, the clip binds, everything drops out, and a step takes two micro-batches where nothing is said."""
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "PP2": (2, dict(pipe=2, micro=2)),
    "DP2": (2, dict(micro=2)),
    "ZeRO-2": (2, dict(zero_stage=2, micro=2)),
    "ZeRO-3": (2, dict(zero_stage=3, micro=2)),
    "TP2·PP2": (4, dict(tensor=2, pipe=2)),
}
MATRIX = list(LAYOUTS)
LAYOUTS |= {
    "PP2·DP2": (4, dict(pipe=2, micro=2)),
    "TP2·ZeRO-3": (4, dict(tensor=2, zero_stage=3, micro=2)),
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "ZeRO-2, offloaded": (2, dict(zero_stage=2, micro=2, offload_optimizer=True)),
    "ZeRO-3, all offloaded": (2, dict(zero_stage=3, micro=2, offload_optimizer=True, offload_parameters=True)),
    "TP4": (4, dict(tensor=4)),
    "PP4": (4, dict(pipe=4, micro=2)),
    "ZeRO-3 on three": (3, dict(zero_stage=3, micro=2)),  # which divide no parameter's size; the batch is not theirs to train on
}
SUBJECTS = {"dropping": DROPPING, "dropping, four blocks": DROPPING | {"num_layers": 4}, "llama": LLAMA}
SCALED = {"fp16": {"initial_scale_power": 19, "loss_scale_window": 2}}
"""fp16 that overflows in its first steps and whose scale grows again soon."""


def settings_of(layout: str, subject: str, precision: str) -> tuple[int, dict]:
    world, settings = LAYOUTS[layout]
    explicit = {"explicit": SCALED} if precision == "fp16" else {}
    return world, dict(settings, model=SUBJECTS[subject], precision=precision, steps=STEPS, **explicit)


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def uninterrupted(place: Path):
    """uninterrupted(layout, subject, precision): every rank's losses of all steps, and the folder with step_4 and step_8. Run once."""

    @functools.cache
    def run(layout: str, subject: str = "dropping", precision: str = "fp32") -> tuple[list[dict], Path]:
        world, settings = settings_of(layout, subject, precision)
        folder = place / f"{layout}-{subject}-{precision}"
        saves = {step: folder / f"step_{step}" for step in (HALF, STEPS)}
        return run_ranks(training.call, world, dict(settings, save=saves)), folder

    return run


def resumed(folder: Path, layout: str, subject: str = "dropping", precision: str = "fp32", **more) -> list[dict]:
    """The second half on a layout, from a checkpoint of the first."""
    world, settings = settings_of(layout, subject, precision)
    return run_ranks(training.call, world, dict(settings, resume=folder / f"step_{HALF}", **more))


# The same layout.

SAME = [(layout, "dropping", precision) for layout in LAYOUTS for precision in ("fp32", "bf16") if layout not in ("PP4", "ZeRO-3 on three")]
SAME += [("PP4", "dropping, four blocks", "bf16"), ("TP2", "llama", "fp32"), ("TP2·PP2", "llama", "bf16")]
SAME += [(layout, "dropping", "fp16") for layout in ("one rank", "TP2", "PP2", "ZeRO-2", "ZeRO-3")]
SOON = {("ZeRO-3", "fp32"), ("DP2", "bf16"), ("one rank", "fp16")}


@pytest.mark.parametrize(
    ("layout", "subject", "precision"), all_but_slow(SAME, {(layout, "dropping", precision) for layout, precision in SOON}), ids=str
)
def test_the_same_layout_goes_on_bit_for_bit(layout: str, subject: str, precision: str, uninterrupted, tmp_path: Path) -> None:
    """Losses, norms and an evaluation as hex; and the last step's weights, moments, counters and generators by their files' hashes."""
    whole, folder = uninterrupted(layout, subject, precision)
    again = resumed(folder, layout, subject, precision, save={STEPS: tmp_path / "step_8"})
    for rank, other in zip(whole, again, strict=True):
        for key, last in (("loss", STEPS - HALF), ("norm", STEPS - HALF), ("eval", 1)):
            assert [value.hex() for value in rank[key][-last:]] == [value.hex() for value in other[key]], key
        assert len(set(rank["loss"])) == STEPS, "a loss that stands still compares nothing"
    manifests = [json.loads((path / MANIFEST).read_text()) for path in (folder / "step_8", tmp_path / "step_8")]
    assert manifests[0] == manifests[1]
    if precision == "fp16":
        half = json.loads((folder / "step_4" / MANIFEST).read_text())
        assert 0 < half["counters"]["skipped_steps"] < HALF - 1, "some steps are skipped, some are not"


def forget_the_moments(engine: Engine) -> None:
    for parameter in engine.parameters.values():
        fragment(parameter, "exp_avg").values.zero_()


def forget_adams_step(engine: Engine) -> None:
    for state in engine.optimizer.optimizer.state.values():
        state["step"].zero_()


def forget_a_bit(engine: Engine) -> None:
    """One bit of one weight, as the engine keeps it."""
    weights = fragment(next(iter(engine.parameters.values())), "weights").values.view(torch.int32)
    weights[5] ^= 1


FORGET = {"the moments": forget_the_moments, "Adam's step": forget_adams_step, "a bit": forget_a_bit}


@pytest.mark.parametrize("what", FORGET)
def test_the_comparison_can_fail(what: str, uninterrupted, tmp_path: Path) -> None:
    (whole,), folder = uninterrupted("one rank")
    (again,) = resumed(folder, "one rank", spoil=FORGET[what], save={STEPS: tmp_path / "step_8"})
    assert again["loss"][0] == whole["loss"][HALF], "the first loss comes before the first update"
    files = [json.loads((path / MANIFEST).read_text())["files"] for path in (folder / "step_8", tmp_path / "step_8")]
    assert files[0]["weights-rank00000-000.safetensors"] != files[1]["weights-rank00000-000.safetensors"]
    if what != "a bit":
        assert furthest(again["loss"][1:], whole["loss"][HALF + 1 :]) > 2 * LOSS


# Another layout.

PAIRS = [(a, b) for a in MATRIX for b in MATRIX]
SHORT = [("one rank", "TP2·PP2"), ("ZeRO-3", "TP2")]
OTHER = [("dropping", *pair) for pair in PAIRS]
OTHER += [("llama", "TP2·PP2", "ZeRO-3"), ("llama", "ZeRO-3", "TP2"), ("dropping", "TP4", "ZeRO-3"), ("dropping", "ZeRO-3", "TP4")]
OTHER += [("dropping, four blocks", "PP4", "TP2"), ("dropping, four blocks", "ZeRO-3, all offloaded", "PP4")]
OTHER += [("dropping", "TP2·SP", "PP2·DP2")]


@pytest.mark.parametrize(("subject", "a", "b"), all_but_slow(OTHER, [("dropping", *pair) for pair in SHORT]), ids=str)
def test_half_on_a_and_half_on_b_is_the_whole_on_one_rank(subject: str, a: str, b: str, uninterrupted) -> None:
    """Losses of fp32 within 2e-5, with dropout."""
    (alone,), _ = uninterrupted("one rank", subject)
    _, folder = uninterrupted(a, subject)
    for rank in resumed(folder, b, subject):
        assert furthest(rank["loss"], alone["loss"][HALF:]) <= LOSS
        assert furthest(rank["eval"], alone["eval"]) <= LOSS


SCALES = [("one rank", "ZeRO-3"), ("DP2", "TP2"), ("ZeRO-2", "PP2"), ("PP2", "DP2")]


@pytest.mark.parametrize(("a", "b"), all_but_slow(SCALES, SCALES[:1]), ids=str)
def test_the_loss_scale_goes_on_as_on_one_rank(a: str, b: str, uninterrupted) -> None:
    """fp16: every step's scale and the steps skipped exactly, losses to 1e-3. DeepSpeed's own number depends on the data ranks."""
    (alone,), _ = uninterrupted("one rank", "dropping", "fp16")
    _, folder = uninterrupted(a, "dropping", "fp16")
    for rank in resumed(folder, b, precision="fp16"):
        assert rank["scale"] == alone["scale"][HALF:] and rank["skipped"] == alone["skipped"][HALF:]
        assert len(set(rank["scale"])) > 1, "a scale that stands still compares little"
        assert furthest(rank["loss"], alone["loss"][HALF:]) <= LOW_PRECISION_LOSS


PRECISIONS_CHANGE = [("PP2", "bf16", "ZeRO-3", "bf16"), ("DP2", "bf16", "TP2", "fp32"), ("ZeRO-3", "fp32", "PP2", "bf16")]
PRECISIONS_CHANGE += [("ZeRO-2", "fp16", "TP2", "bf16"), ("TP2", "bf16", "one rank", "fp16")]


@pytest.mark.slow
@pytest.mark.parametrize(("a", "before", "b", "after"), PRECISIONS_CHANGE, ids=str)
def test_another_precision_goes_on_with_the_same_weights(a: str, before: str, b: str, after: str, uninterrupted) -> None:
    """As the same change does on one rank: to 1e-3 where a half has low precision, to 2e-5 where the second is fp32."""
    _, folder = uninterrupted(a, "dropping", before)
    (alone,) = resumed(folder, "one rank", precision=after)
    assert len(set(alone["loss"])) == STEPS - HALF
    for rank in resumed(folder, b, precision=after):
        assert furthest(rank["loss"], alone["loss"]) <= (LOSS if after == "fp32" else LOW_PRECISION_LOSS)


# What a load sets.


def after_load(settings: dict, folder: Path, initial: bool = False) -> dict:
    """Every rank's fragments and what its model computes with, before a first step."""
    engine, _, grid = training.build(**{key: value for key, value in settings.items() if key != "steps"})
    facts = load_initial(folder, engine) if initial else load_checkpoint(folder, engine)
    ensure_moments(engine)
    found: dict = {"facts": facts, "differences": process_state.differences(facts, engine), "tensor_rank": grid.tensor_rank, "parts": {}}
    for name, parameter in engine.parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            model = parameter.detach().clone()
        fragments = {kind: (fragment(parameter, kind).start, fragment(parameter, kind).values.clone()) for kind in KINDS}
        found["parts"][name] = (slice_of(parameter), model, fragments)
    return found


LOADED = [("TP2·PP2", "bf16"), ("ZeRO-3 on three", "fp16"), ("DP2", "bf16"), ("ZeRO-2, offloaded", "fp32"), ("ZeRO-3", "bf16")]


@pytest.mark.parametrize(("layout", "precision"), all_but_slow(LOADED, LOADED[:2]))
@pytest.mark.parametrize("initial", [False, True], ids=["resumed", "begun"])
def test_a_load_sets_every_element_bit_for_bit(initial: bool, layout: str, precision: str, uninterrupted) -> None:
    """Masters and moments are the file's, the model's weights their rounding, on the first stage and on its copy, padding zero.

    Of a run that begins with the weights the moments are zero.
    """
    _, folder = uninterrupted("TP2")
    whole = by_another_reader(folder / "step_4")
    if initial:
        whole |= {kind: {name: np.zeros_like(array) for name, array in whole[kind].items()} for kind in KINDS[1:]}
    world, settings = settings_of(layout, "dropping", precision)
    degree = settings.get("tensor", 1)
    ranks = run_ranks(after_load, world, settings, folder / "step_4", initial)
    for rank in ranks:
        assert rank["facts"]["step"] == HALF and rank["differences"]["layout.tensor" if degree == 1 else "layout.pipe"] is not None
        for name, (cut, model, fragments) in rank["parts"].items():
            expected = {kind: cut.cut(torch.from_numpy(whole[kind][name]), rank["tensor_rank"], degree) for kind in KINDS}
            rounded = expected["weights"].to(PRECISIONS[precision])
            assert model.dtype == rounded.dtype and torch.equal(model.view(-1), rounded.view(-1)), name
            for kind, (start, values) in fragments.items():
                assert values.numpy().tobytes() == expected[kind].flatten()[start : start + len(values)].numpy().tobytes(), (kind, name)
    copies = [rank for rank in ranks if "embedding.weight" in rank["parts"]]
    assert len(copies) == world, "the tied table is on both stages"


def generators_after(settings: dict, folder: Path, seed: int) -> list[float]:
    """What a rank draws after it has saved (where nothing is there yet) or loaded, its own generators seeded before."""
    engine, _, grid = training.build(**{key: value for key, value in settings.items() if key != "steps"})
    random.seed(seed + grid.rank), torch.manual_seed(seed + grid.rank)
    if folder.exists():
        load_checkpoint(folder, engine)
    elif seed:
        Saver().save(folder, engine, {"step": 0})
    return [random.random(), float(torch.rand(()))]


def test_each_rank_gets_its_own_generators_back_on_the_same_layout_only(tmp_path: Path) -> None:
    _, two = settings_of("TP2", "dropping", "fp32")
    _, other = settings_of("DP2", "dropping", "fp32")
    drawn = run_ranks(generators_after, 2, two, tmp_path / "step_0", 10)
    assert drawn[0] != drawn[1]
    assert run_ranks(generators_after, 2, two, tmp_path / "step_0", 0) == drawn
    assert (
        run_ranks(generators_after, 2, other, tmp_path / "step_0", 0)
        == run_ranks(generators_after, 2, other, tmp_path / "none", 0)
        != drawn
    )


# Damage and strangers, all of it before anything is set.


def state_of(engine: Engine) -> list[torch.Tensor]:
    return [fragment(parameter, kind).values.clone() for parameter in engine.parameters.values() for kind in KINDS]


def tries(settings: dict, folders: list[Path]) -> list[str]:
    """What this rank hears of each folder. The engine must stay as it was where it is not loaded."""
    engine, *_ = training.build(**{key: value for key, value in settings.items() if key != "steps"})
    ensure_moments(engine)
    before, told = state_of(engine), []
    for folder in folders:
        try:
            load_checkpoint(folder, engine)
            told.append("loaded")
        except Mistake as mistake:
            told.append(str(mistake))
        assert told[-1] == "loaded" or all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    return told


@pytest.fixture(scope="module")
def copies(uninterrupted, place: Path) -> Callable[[str], Path]:
    """copies(name): a copy of one checkpoint, of two tensor ranks, to damage."""

    def copy(name: str) -> Path:
        _, folder = uninterrupted("TP2")
        return Path(shutil.copytree(folder / "step_4", place / "copies" / name))

    return copy


def test_a_flipped_bit_anywhere_is_found_and_named_before_anything_is_set(copies) -> None:
    """100 random bits in random files, one at a time."""
    draw = random.Random(0)
    victims, folders = [], []
    for i in range(100):
        folder = copies(f"flip-{i}")
        file = draw.choice(sorted(path for path in folder.iterdir() if path.name != MANIFEST))
        data = bytearray(file.read_bytes())
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        victims.append(file), folders.append(folder)
    first, second = run_ranks(tries, 2, settings_of("ZeRO-3", "dropping", "fp32")[1], folders)
    assert first == second and len({victim.name for victim in victims}) == 7
    for victim, told in zip(victims, first, strict=True):
        assert f"{victim} is damaged: SHA-256 " in told and "→ use another checkpoint of the run" in told


FILE = "exp_avg-rank00001-000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / FILE).unlink(), f"{FILE} is damaged: missing"),
    "empty": (lambda folder: os.truncate(folder / FILE, 0), f"{FILE} is damaged: 0 bytes"),
    "cut short": (lambda folder: os.truncate(folder / FILE, 5000), f"{FILE} is damaged: 5000 bytes"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "its manifest.json cannot be read"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "Expecting value"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 3000), "is not a checkpoint that can be read"),
    "an older format": (
        lambda folder: change_manifest(folder, lambda told: told.update(format=1)),
        "has format 1, this version reads format 2",
    ),
    "no counters": (lambda folder: change_manifest(folder, lambda told: told.pop("counters")), "counters hold no steps"),
    "a piece less": (
        lambda folder: change_manifest(folder, lambda told: told["tensors"]["exp_avg"]["embedding.weight"]["pieces"].pop()),
        "exp_avg of 'embedding.weight' lacks 42:83 along dim 0",
    ),
    "a tensor more": (
        lambda folder: change_manifest(folder, lambda told: [rename(told, kind, "position.weight", "other.weight") for kind in KINDS]),
        "holds no tensor position.weight",
    ),
    "generators of another": (lambda folder: change_generators(folder, b"[1, 2]"), "loaded"),  # of another layout: not looked at
}


def rename(told: dict, kind: str, old: str, new: str) -> None:
    told["tensors"][kind][new] = told["tensors"][kind].pop(old)


def change_generators(folder: Path, data: bytes) -> None:
    write_synced(folder / "generators.json", data)
    file = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_manifest(folder, lambda told: told["files"].update({"generators.json": file}))


def test_damage_of_every_kind_is_found_and_named_before_anything_is_set(copies) -> None:
    folders = []
    for name, (damage, _) in DAMAGES.items():
        damage(folder := copies(name))
        folders.append(folder)
    first, second = run_ranks(tries, 2, settings_of("ZeRO-3", "dropping", "fp32")[1], folders)
    assert first == second
    for (name, (_, words)), folder, told in zip(DAMAGES.items(), folders, first, strict=True):
        assert words in told, name
        assert told == "loaded" or (str(folder) in told or "counters" in name) and "→" in told, told


HOSTILE = [b"", b"[]", b"{}", b"[1, 2]", b'[{"python": 3}, {}]', b"[" * 99_999]


def test_hostile_generators_are_refused_on_their_own_layout(copies) -> None:
    folders = [copies(f"generators-{i}") for i in range(len(HOSTILE))]
    for folder, data in zip(folders, HOSTILE, strict=True):
        change_generators(folder, data)
    for rank in run_ranks(tries, 2, settings_of("TP2", "dropping", "fp32")[1], folders):
        assert all("generators" in told and "cannot be" in told and "→ use another checkpoint of the run" in told for told in rank), rank


def tries_anyway(settings: dict, folder: Path, load: Callable = load_checkpoint) -> str:
    engine, *_ = training.build(**{key: value for key, value in settings.items() if key != "steps"})
    try:
        load(folder, engine)
        return "loaded"
    except Mistake as mistake:
        return str(mistake)


def test_another_model_is_refused_with_both_shapes(uninterrupted) -> None:
    _, folder = uninterrupted("TP2")
    cases = {
        "embedding.weight is [83, 32] in": {"vocab_size": 84},
        "holds blocks.1.": {"num_layers": 1},
        "holds no tensor head.weight": {"tied": False},
    }
    for words, change in cases.items():
        settings = settings_of("PP2" if change.get("num_layers") != 1 else "TP2", "dropping", "fp32")[1]
        load = load_initial if "tied" in change else load_checkpoint
        told = run_ranks(tries_anyway, 2, settings | {"model": DROPPING | change}, folder / "step_4", load)
        assert told[0] == told[1] and words in told[0] and "→" in told[0], told


def test_weights_alone_are_not_resumed_from(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1")
    (told,) = run_ranks(tries_anyway, 1, settings_of("one rank", "dropping", "fp32")[1], folder)
    assert told.startswith(f"{folder} holds weights but no exp_avg → resume from a checkpoint that a training run wrote")


def test_one_process_reads_what_four_wrote(uninterrupted) -> None:
    _, folder = uninterrupted("TP2·PP2")
    whole = by_another_reader(folder / "step_4")
    with Reader(folder / "step_4") as reader:
        reader.check()
        for kind, table in whole.items():
            assert all(torch.equal(reader.read(name, kind), torch.from_numpy(value)) for name, value in table.items())
