"""What the header says of a resumed run: bit for bit, within rounding, or with other learning rates."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from research.cluster.software import digest_of
from research.config import Experiment, schema
from research.config.diff import diff
from research.tracking.run_folder import RunFolder
from research.training import resume
from research.training.continuation import RECORDED, continuation
from research.training.fallback import Start
from tests.research.helpers.example import example

EXACT = "bit for bit as if it had never stopped"
SAME_CODE = {
    True: "",
    False: ", if the code, which has changed, still computes the same",
    None: ", if the code is the one that saved it, which this checkpoint does not say",
}
WSD = {"decay": "wsd", "decay_steps": 50}
AT_120 = [  # settings then, settings now, differences of layout and machine, what is said at step 120
    ({}, {}, {}, EXACT),
    ({}, {"checkpoints": {"every": 7}, "track": {"group": "x"}, "data": {"cache": "elsewhere"}}, {}, EXACT),
    ({}, {"parallel": {"recompute": "full"}}, {}, EXACT),
    (
        {},
        {},
        {"layout.tensor": (1, 2), "machine.threads": (4, 2)},
        "within rounding (tensor 1 → 2, threads 4 → 2) as if it had never stopped",
    ),
    ({}, {"deepspeed": {"x": 1}}, {}, "within rounding (other DeepSpeed settings) as if it had never stopped"),
    ({}, {"schedule": {"steps": 600}}, {}, "same state, other learning rates from here on (cosine over 600 steps, not 300)"),
    (
        {"optimizer": {"decay": "linear"}},
        {"optimizer": {"decay": "linear"}, "schedule": {"steps": 200}},
        {"layout.precision": ("fp32", "bf16")},
        "same state, other learning rates from here on (linear over 200 steps, not 300), within rounding (precision fp32 → bf16)",
    ),
    ({"optimizer": WSD}, {"optimizer": WSD, "schedule": {"steps": 600}}, {}, "bit for bit as if it had been begun with 600 steps"),
    (
        {"optimizer": WSD, "schedule": {"steps": 150}},
        {"optimizer": WSD},
        {},
        "same state, other learning rates from here on (wsd over 300 steps, not 150)",
    ),
    ({"optimizer": {"decay": "constant"}}, {"optimizer": {"decay": "constant"}, "schedule": {"steps": 600}}, {}, EXACT),
    ({"optimizer": {"decay": "inverse_sqrt"}}, {"optimizer": {"decay": "inverse_sqrt"}, "schedule": {"steps": 600}}, {}, EXACT),
    (
        {},
        {"schedule": {"validate_every": 5, "log_every": 7}, "sample": {"every": 3}, "watch": {"spike": 6.0}},
        {},
        f"{EXACT}, with other validations, rows of metrics.jsonl, samples and checks of each step",
    ),
]


def settled(changes: dict) -> Experiment:
    """The example with changes by group, of groups that have defaults too."""
    groups = {"checkpoints": schema.Checkpoints, "track": schema.Track, "sample": schema.Sample, "watch": schema.Watch}
    settings = {name: groups[name](**values) if name in groups else values for name, values in changes.items()}
    if "data" in settings:
        settings["data"] = schema.Data(**{**example().data.model_dump(), **settings["data"]})
    return example(**settings)


@pytest.mark.parametrize(("then", "now", "differences", "said"), AT_120)
def test_bit_for_bit_is_said_only_where_nothing_that_matters_has_changed(then: dict, now: dict, differences: dict, said: str) -> None:
    changes = diff(settled(then), settled(now))
    assert resume.science(changes) == []
    for same_code, condition in SAME_CODE.items():
        assert continuation(120, changes, settled(now), differences, same_code, "cpu") == f"{said}{condition}"
    assert "bit for bit" not in continuation(120, changes, settled(now), differences, True, "cuda")
    deterministic = settled(now | {"deterministic": True})  # on a GPU, then and now: what is said of a CPU holds
    assert continuation(120, changes, deterministic, differences, True, "cuda") == f"{said}{SAME_CODE[True]}"


def test_kernels_that_are_deterministic_only_now_make_no_bit_for_bit() -> None:
    now = settled({"deterministic": True})
    said = continuation(120, [], now, {"machine.deterministic": (False, True)}, True, "cuda")
    assert said == "within rounding (deterministic False → True) as if it had never stopped"
    said = continuation(120, [], settled({}), {"machine.deterministic": (True, False)}, True, "cuda")
    assert said == "within rounding (deterministic True → False, GPU kernels) as if it had never stopped"


CODE = {"models/mlp.py": "1"}


@pytest.mark.parametrize(("facts", "same_code"), [({"code": digest_of(CODE)}, True), ({"code": "b"}, False), ({}, None)])
def test_a_checkpoint_that_does_not_say_its_code_is_not_said_to_be_of_another(
    facts: dict, same_code: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints had no such fact once, and nothing speaks for a change of the code since then."""
    from research.training import setup

    monkeypatch.setattr(setup.process_state, "differences", lambda facts, engine: {})
    resumed = Start(RunFolder(tmp_path / "mine" / "aaaaaa"), tmp_path / "step_000120", 120, [])
    job, engine = SimpleNamespace(library=CODE, experiment=example()), SimpleNamespace(device=SimpleNamespace(type="cpu"))
    line = setup.resume_line(resumed, {"step": 120, **facts}, job, engine, {})  # type: ignore[arg-type]
    assert line == f"step 120 of mine-aaaaaa, step_000120 · {EXACT}{SAME_CODE[same_code]}"


def test_every_setting_that_may_change_is_known_to_change_steps_or_not() -> None:
    """A new group in MAY_CHANGE must be put in one of these lists, or the header would promise too much."""
    nothing = {"schema", "question", "parent", "changes", "data.cache", "checkpoints", "track", "profile"}
    # parallel/engines/process_state.py compares these
    by_arithmetic = {"schedule.micro_batch_size", "parallel", "precision", "deterministic"}
    assert nothing | by_arithmetic | {"schedule.steps", "deepspeed"} | RECORDED.keys() == set(resume.MAY_CHANGE)
