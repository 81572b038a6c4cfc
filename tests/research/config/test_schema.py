"""The schema: refusals are sentences, a refused assignment changes nothing, what is saved comes back."""

import json
import subprocess
import sys

import pytest

from models import config as shapes
from models.config import FOLLOWING, ROTARY
from research.config import GPT, Data, Experiment, Optimizer, Profile, Schedule, schema, serialization
from research.config.overrides import parse
from research.config.serialization import build, load, resolved, save
from research.config.settings import is_group, needs
from tests.research.helpers.example import MODEL, OPTIMIZER, SCHEDULE, example, sentence

SECTIONS = ("Data", "Schedule", "Optimizer", "Parallel", "Evaluate", "Sample", "Track", "Experiment")


def test_the_schema_imports_nothing_heavy() -> None:
    heavy = ["torch", "deepspeed", "transformers", "wandb", "numpy"]
    program = f"import sys, research.config; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


BETAS = "use 2 values, each a finite number at least 0 and below 1"
TEXTS = "use any number of values, each text"
REFUSED = [
    ("model", "num_headz", 3, "model.num_headz is not a setting → did you mean model.num_heads?"),
    ("model", "num_heads", -1, "model.num_heads = -1 does not work → use a whole number greater than 0"),
    ("model", "num_heads", 0, "model.num_heads = 0 does not work → use a whole number greater than 0"),
    ("model", "num_heads", "6", "model.num_heads = '6' does not work → use a whole number greater than 0"),
    ("model", "num_heads", True, "model.num_heads = True does not work → use a whole number greater than 0"),
    ("model", "num_heads", 6.0, "model.num_heads = 6.0 does not work → use a whole number greater than 0"),
    ("model", "bias", 1, "model.bias = 1 does not work → use True or False"),
    ("model", "norm_eps", float("inf"), "model.norm_eps = inf does not work → use a finite number greater than 0"),
    ("model", "norm", "batch", "model.norm = 'batch' is not known → use layernorm, rmsnorm or variant:YourClass"),
    (
        "model",
        "num_heads",
        5,
        "model.num_heads = 5 does not divide model.hidden_size = 192 → use 1, 2, 3, 4, 6 or 8, or set model.head_size",
    ),
    ("optimizer", "lr", float("nan"), "optimizer.lr = nan does not work → use a finite number greater than 0"),
    ("optimizer", "decay", "cos", f"optimizer.decay = 'cos' is not known → use {', '.join(schema.DECAYS)} or variant:YourClass"),
    ("optimizer", "betas", (0.9, 1.0), f"optimizer.betas[1] = 1.0 does not work → {BETAS}"),
    ("optimizer", "betas", (0.9,), f"optimizer.betas = (0.9,) does not work → {BETAS}"),
    ("optimizer", "decay_steps", 0, "optimizer.decay_steps = 0 does not work → use a whole number greater than 0 or None"),
    ("schedule", "batch_size", 0, "schedule.batch_size = 0 does not work → use a whole number greater than 0"),
    ("schedule", "validate_every", -1, "schedule.validate_every = -1 does not work → use a whole number at least 0"),
    ("model", "mlp_dropout", 1.0, "model.mlp_dropout = 1.0 does not work → use a finite number at least 0 and below 1"),
    ("model", "residual_dropout", -0.1, "model.residual_dropout = -0.1 does not work → use a finite number at least 0 and below 1"),
    ("parallel", "recompute", "all", "parallel.recompute = 'all' does not work → use none, selective or full"),
    ("parallel", "zero_stage", 4, "parallel.zero_stage = 4 does not work → use 0, 1, 2 or 3"),
    ("parallel", "tensors", 2, "parallel.tensors is not a setting → did you mean parallel.tensor?"),
    ("evaluate", "every", -1, "evaluate.every = -1 does not work → use a whole number at least 0"),
    ("evaluate", "tasks", "validation", f"evaluate.tasks = 'validation' does not work → {TEXTS} that is not empty and has no zero byte"),
    ("evaluate", "tasks", ("",), f"evaluate.tasks[0] = '' does not work → {TEXTS} that is not empty and has no zero byte"),
    ("sample", "prompts", (3,), f"sample.prompts[0] = 3 does not work → {TEXTS}"),
    ("sample", "top_p", 0.0, "sample.top_p = 0.0 does not work → use a finite number greater than 0 and at most 1"),
    ("schedule", "validate_tokens", -1, "schedule.validate_tokens = -1 does not work → use a whole number at least 0"),
    ("track", "tags", ("a", ""), f"track.tags[1] = '' does not work → {TEXTS} that is not empty and has at most 64 characters"),
    ("track", "job_type", "", "track.job_type = '' does not work → use text that is not empty and has at most 64 characters"),
    ("track", "mode", "of", "track.mode = 'of' does not work → use auto, online, offline or disabled"),
]


@pytest.mark.parametrize(("section", "name", "value", "said"), REFUSED)
def test_a_refused_assignment_is_a_sentence_and_leaves_the_old_value(section: str, name: str, value: object, said: str) -> None:
    experiment = example()
    assert sentence(lambda: setattr(getattr(experiment, section), name, value)) == said
    assert experiment == example()


@pytest.mark.parametrize(("section", "name", "value", "said"), [case for case in REFUSED if case[0] in ("model", "optimizer", "schedule")])
def test_construction_refuses_in_the_same_words(section: str, name: str, value: object, said: str) -> None:
    kind, settings = {"model": (GPT, MODEL), "optimizer": (Optimizer, OPTIMIZER), "schedule": (Schedule, SCHEDULE)}[section]
    assert sentence(lambda: kind(**settings | {name: value})) == said


def test_a_misspelt_setting_is_named_before_the_one_that_is_missing_for_it() -> None:
    misspelt = {name: value for name, value in MODEL.items() if name != "num_heads"} | {"num_head": 6}
    assert sentence(lambda: GPT(**misspelt)) == "model.num_head is not a setting → did you mean model.num_heads?"


def test_everything_missing_is_named() -> None:
    assert sentence(lambda: Data(train="a")) == ("data.validation and data.tokenizer are missing → give every setting that has no default")


def test_experiment_level_mistakes() -> None:
    assert sentence(lambda: example(lr=3)) == "lr is not a setting → did you mean optimizer.lr?"
    assert sentence(lambda: example(modell=3)) == "modell is not a setting → did you mean model?"
    assert sentence(lambda: example(precision="fp8")) == "precision = 'fp8' does not work → use fp32, bf16 or fp16"
    assert sentence(lambda: example(question="")) == "question = '' does not work → use text that is not empty and has no zero byte"
    assert sentence(lambda: example(deepspeed={"hook": print})).startswith("deepspeed")
    assert sentence(lambda: example(data=3)) == "data = 3 does not work → use Data(…)"


def test_a_plain_shape_becomes_one_that_refuses_in_our_words() -> None:
    plain = Experiment(**dict(example()) | {"model": shapes.GPT(**MODEL)})
    assert plain == example()
    assert isinstance(plain.model, GPT)


ADDED = {GPT: {"attention", "kind"}, Data: {"examples"}, Optimizer: {"name"}}
"""Settings whose default is what there was before they were added, so that older config.py files stay what they are."""


def test_science_has_no_defaults() -> None:
    absent = {"cache", "log_every", "validate_tokens", "decay_steps", "batch_ramp", "length_ramp"}
    for kind in (GPT, Data, Schedule, Optimizer):
        optional = {name for name, field in kind.model_fields.items() if not field.is_required()}
        assert optional <= {*ROTARY, *FOLLOWING, *absent, *ADDED.get(kind, ())}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_says_what_it_is_and_what_it_needs(section: str) -> None:
    for name, field in getattr(schema, section).model_fields.items():
        assert field.description, name
        assert is_group(field) or "<" not in needs(field), name


def test_saved_and_loaded_is_equal(tmp_path) -> None:
    experiment = example(optimizer={"lr": 0.1 + 0.2, "betas": (1 / 3, 0.95)}, deepspeed={"zero_optimization": {"x": [1, None, 2.5]}})
    save(experiment, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == experiment
    assert json.loads((tmp_path / "config.json").read_text())["schema"] == serialization.SCHEMA
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_newer_schema_is_refused_an_older_one_migrated(tmp_path, monkeypatch) -> None:
    path, settings, now = tmp_path / "config.json", resolved(example()), serialization.SCHEMA
    path.write_text(json.dumps(settings | {"schema": now + 1}))
    assert f"schema {now + 1}, this code reads up to {now}" in sentence(lambda: load(path))
    monkeypatch.setattr(serialization, "SCHEMA", now + 2)
    monkeypatch.setitem(serialization.MIGRATIONS, now, lambda old: {**old, "seed": old["seed"] + 10})
    monkeypatch.setitem(serialization.MIGRATIONS, now + 1, lambda old: {**old, "seed": old["seed"] * 2})
    path.write_text(json.dumps(settings | {"schema": now, "seed": 1}))
    assert load(path).seed == 22


SCHEMA_1 = """{
  "schema": 1, "question": "what is a small GPT's loss?", "parent": null,
  "model": {
    "num_layers": 4, "hidden_size": 192, "num_heads": 6, "num_kv_heads": 6, "ffn_size": 768, "vocab_size": 8192, "seq_length": 128,
    "norm": "layernorm", "norm_eps": 1e-05, "position": "learned", "mlp": "gelu", "residual": "pre_norm", "init": "gpt2", "bias": true,
    "qkv_bias": true, "qk_norm": false, "tied": true, "rotary_fraction": null, "rotary_base": null
  },
  "data": {
    "train": "builtin:state_of_the_union/train", "validation": "builtin:state_of_the_union/val", "tokenizer": "builtin:bpe-8192",
    "cache": ".cache"
  },
  "schedule": {"steps": 300, "batch_size": 16, "micro_batch_size": 8, "validate_every": 100, "log_every": 10},
  "optimizer": {
    "lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.1, "clip": 1.0, "decay": "cosine", "warmup_steps": 30,
    "min_lr": 0.0003, "decay_steps": null, "label_smoothing": 0.0
  },
  "parallel": {"pipe": 1, "tensor": 2, "zero_stage": 1, "offload_optimizer": false, "offload_parameters": false},
  "precision": "fp32", "track": {"project": "tessera", "mode": "auto", "group": null, "runs": "runs"}, "seed": 1, "deepspeed": {}
}"""
"""What a run wrote before there was dropout."""


def kept(now: dict, then: dict, *but: str) -> dict:
    """What `now` says of the settings that `then` had, apart from the groups `but`."""
    groups = {name: now[name] for name in then if name not in but}
    return {
        name: {key: value[key] for key in then[name]} if isinstance(value, dict) and name != "deepspeed" else value
        for name, value in groups.items()
    }


def without_schema_6(settings: dict) -> dict:
    """The settings without those that schema 6 has added, which must have their old meaning."""
    added = settings["schedule"].pop("validate_tokens"), settings["track"].pop("tags"), settings["track"].pop("job_type")
    assert added == (0, [], "train")
    return settings


def test_schema_1_had_no_dropout_sequence_parallelism_or_recomputation(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(SCHEMA_1)
    found = load(path)
    rates = {name: value for name, value in found.model if name.endswith("_dropout")}
    assert rates == {f"{place}_dropout": 0.0 for place in ("embedding", "residual", "mlp", "attention")} and not found.model.drops
    assert (found.parallel.sequence, found.parallel.recompute) == (False, "none")
    now, then = without_schema_6(resolved(found)), json.loads(SCHEMA_1)
    for section in ("model", "parallel"):
        assert {name: now[section][name] for name in then[section]} == then[section]  # the rest is as it was
    assert kept(now, then, "schema", "model", "parallel") == kept(then, then, "schema", "model", "parallel")
    save(found, path)
    assert load(path) == found and json.loads(path.read_text())["schema"] == serialization.SCHEMA


def test_dropout_in_a_config_of_schema_1_is_not_overwritten(tmp_path) -> None:
    """It cannot have been there; where somebody wrote it in by hand, it is what they want."""
    settings = json.loads(SCHEMA_1)
    settings["model"]["mlp_dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "config.json").model.mlp_dropout == 0.5


def test_schema_2_saved_once_and_watched_for_nothing(tmp_path) -> None:
    settings = resolved(example()) | {"schema": 2}
    del settings["checkpoints"], settings["watch"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = load(tmp_path / "config.json")
    assert found.checkpoints.every == 0 and not found.checkpoints.background
    assert (found.watch.hang_seconds, found.watch.non_finite, found.watch.most_skips, found.watch.spike) == (0.0, "skip", 0, 0.0)


@pytest.mark.parametrize(("schema", "ramps"), [(7, ("batch_ramp", "length_ramp")), (8, ("length_ramp",))])
def test_steps_were_alike_before_there_were_ramps(schema: int, ramps: tuple[str, ...], tmp_path) -> None:
    settings = resolved(example()) | {"schema": schema}
    assert [settings["schedule"].pop(ramp) for ramp in ramps] == [None] * len(ramps)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "config.json") == example()


def test_schema_3_had_rotary_positions_of_their_own_wavelengths(tmp_path) -> None:
    rotary = {"position": "rotary", "rotary_fraction": 0.5, "rotary_base": 5e5, "rotary_scaling": "none"}
    settings = resolved(example(model=rotary)) | {"schema": 3}
    for name in ("rotary_scaling", "rotary_factor", "rotary_low_factor", "rotary_high_factor", "rotary_original_length"):
        del settings["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "config.json") == example(model=rotary)


SCHEMA_4 = """{
  "schema": 4, "question": "does an ablation of a rotary model learn?", "parent": "gpt_sotu",
  "model": {
    "num_layers": 4, "hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 512, "vocab_size": 8192, "seq_length": 128,
    "norm": "rmsnorm", "norm_eps": 1e-05, "position": "rotary", "mlp": "swiglu", "residual": "pre_norm", "init": "small_wang",
    "bias": false, "qkv_bias": false, "qk_norm": true, "embedding_dropout": 0.0, "residual_dropout": 0.1, "mlp_dropout": 0.0,
    "attention_dropout": 0.0, "tied": false, "rotary_fraction": 1.0, "rotary_base": 10000.0, "rotary_scaling": "none",
    "rotary_factor": null, "rotary_low_factor": null, "rotary_high_factor": null, "rotary_original_length": null
  },
  "init_from": null,
  "data": {
    "train": "builtin:state_of_the_union/train", "validation": "builtin:state_of_the_union/val", "tokenizer": "builtin:bpe-8192",
    "cache": ".cache"
  },
  "schedule": {"steps": 300, "batch_size": 16, "micro_batch_size": 8, "validate_every": 100, "log_every": 10},
  "optimizer": {
    "lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.1, "clip": 1.0, "decay": "cosine", "warmup_steps": 30,
    "min_lr": 0.0003, "decay_steps": null, "label_smoothing": 0.0
  },
  "parallel": {
    "pipe": 1, "tensor": 2, "zero_stage": 1, "offload_optimizer": false, "offload_parameters": false, "sequence": true,
    "recompute": "selective"
  },
  "precision": "bf16", "checkpoints": {"every": 50, "keep_last": 3, "keep_every": 100, "background": true},
  "watch": {"hang_seconds": 60.0, "non_finite": "skip", "most_skips": 5, "spike": 6.0, "on_spike": "stop"},
  "track": {"project": "tessera", "mode": "auto", "group": null, "runs": "runs"}, "seed": 1, "deepspeed": {}
}"""
"""What a run wrote before it could be evaluated on the way."""


def test_schema_4_asked_nothing_on_the_way(tmp_path) -> None:
    path, then = tmp_path / "config.json", json.loads(SCHEMA_4)
    path.write_text(SCHEMA_4)
    found = load(path)
    assert (found.evaluate.every, found.sample.every) == (0, 0)
    now = without_schema_6(resolved(found))
    assert kept(now, then, "schema") == kept(then, then, "schema")
    assert (
        now.keys() - then.keys() == {"evaluate", "sample", "loss", "profile", "deterministic", "changes"}
        and now["schema"] == serialization.SCHEMA
    )
    assert (now["loss"], now["model"]["attention"], now["optimizer"]["name"]) == ("cross_entropy", "softmax", "adamw")
    save(found, path)
    assert load(path) == found


def test_schema_5_had_heads_and_an_output_bias_that_followed(tmp_path) -> None:
    settings = resolved(example()) | {"schema": 5}
    for name in FOLLOWING:
        del settings["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = load(tmp_path / "config.json")
    assert found == example() and (found.model.head_size, found.model.output_bias) == (32, True)


def test_what_follows_is_saved_as_not_set_and_what_is_set_is_kept(tmp_path) -> None:
    """So an override of what it follows from is followed, and a head size of one's own is not lost."""
    for changes, saved, after in (({}, None, 64), ({"head_size": 32}, 32, 32), ({"head_size": 48, "output_bias": False}, 48, 48)):
        save(example(model=changes), tmp_path / "config.json")
        assert json.loads((tmp_path / "config.json").read_text())["model"]["head_size"] == saved
        found = load(tmp_path / "config.json")
        assert found == example(model=changes)
        assert parse(found, ["--model.hidden_size", "384"])[0].model.head_size == after
        found.model.num_kv_heads = 3
        found.model.num_heads = 3
        assert found.model.head_size == after


def test_schema_5_validated_on_all_of_the_held_out_text(tmp_path) -> None:
    settings = resolved(example()) | {"schema": 5}
    for group, name in (("schedule", "validate_tokens"), ("track", "tags"), ("track", "job_type")):
        del settings[group][name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "config.json") == example()


@pytest.mark.parametrize(
    ("steps", "mistake"),
    [
        ("12-10", "profile.steps = '12-10' ends at step 10, before it begins at step 12 → use 10-12"),
        ("abc", "profile.steps = 'abc' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("", "profile.steps = '' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("-3", "profile.steps = '-3' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("1-2-3", "profile.steps = '1-2-3' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("10-12\n", "profile.steps = '10-12\\n' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("١-٢", "profile.steps = '١-٢' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("1" * 5000, f"profile.steps = '{'1' * 60}' is not a range of steps → write FIRST-LAST, such as 10-12"),
        ("0-3", "profile.steps = '0-3' begins at step 0, steps are counted from 1 → use 1-3"),
        ("0", "profile.steps = '0' begins at step 0, steps are counted from 1 → use 1-1"),
    ],
)
def test_steps_that_cannot_be_recorded_are_refused(steps: str, mistake: str) -> None:
    assert sentence(lambda: Profile(steps=steps)) == mistake


def test_the_steps_to_record_are_counted_from_1() -> None:
    assert [list(Profile(steps=steps).recorded) for steps in ("10-12", "7", "1-1")] == [[10, 11, 12], [7], [1]]
    assert not Profile().recorded and not Profile(memory=True).recorded


def test_schema_6_profiled_no_steps(tmp_path) -> None:
    settings = resolved(example()) | {"schema": 6}
    del settings["profile"], settings["deterministic"], settings["watch"]["rendezvous_seconds"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = load(tmp_path / "config.json")
    assert found == example() and (found.profile.steps, found.profile.memory, found.deterministic) == (None, False, False)


HOSTILE = ["", "{", "[1]", "[" * 100_000, "{}", '{"schema": true}', '{"schema": 0}', '{"schema": 1, "self": 1}', '{"schema": 1}']
HOSTILE += ['{"schema": 2, "watch": 3}', '{"schema": 3, "watch": []}']
HOSTILE += ['{"schema": 6, "profile": 3}', '{"schema": 5, "schedule": 3}', '{"schema": 5}']
HOSTILE += ['{"schema": 4, "sample": 3}', '{"schema": 4, "evaluate": {"tasks": "x"}}']
HOSTILE += ['{"schema": 1, "model": 3}', '{"schema": 1, "model": null}', '{"schema": 2}', '{"schema": 2, "model": [1]}']


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_config_is_a_sentence(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in sentence(lambda: load(tmp_path / "config.json"))


def test_a_mistake_in_a_saved_group_is_named(tmp_path) -> None:
    settings = resolved(example())
    settings["model"]["num_headz"] = settings["model"].pop("num_heads")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "model.num_headz is not a setting → did you mean model.num_heads?" in sentence(lambda: load(tmp_path / "config.json"))


def test_build_undoes_resolved() -> None:
    settings = resolved(example())
    del settings["schema"]
    assert build(settings) == example()


def test_schema_9_declared_no_changes(tmp_path) -> None:
    settings = resolved(example(parent="gpt_sotu")) | {"schema": 9}
    assert settings.pop("changes") == []
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "config.json") == example(parent="gpt_sotu", changes=())
