"""An experiment's model is a GPT, a BERT or a T5: each has its own settings, and each setting, sample and verb says for which it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models import encoder_config
from research.cluster.environment import Ranks
from research.config import BERT, GPT, T5, Experiment, FillInMiddle, Masked, serialization
from research.config.abilities import ABILITIES, refuse_other_kinds
from research.config.checks import check
from research.config.diff import diff
from research.config.overrides import parse, show_help
from research.config.schema import MODELS
from research.config.serialization import build, load, migrated, resolved, save
from tests.research.helpers.example import BERT_MODEL, T5_MODEL, bert, example, sentence, t5

KINDS: dict[str, Callable[..., Experiment]] = {"gpt": example, "bert": bert, "t5": t5}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_equal(kind: str, tmp_path: Path) -> None:
    experiment = KINDS[kind]()
    save(experiment, tmp_path / "config.json")
    found = load(tmp_path / "config.json")
    assert found == experiment and type(found.model) is MODELS[kind]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["kind"] == kind


def test_a_model_of_an_older_schema_is_a_gpt() -> None:
    settings = resolved(example()) | {"schema": 11}
    del settings["model"]["kind"]
    assert migrated(settings, Path("config.json")) == example()
    assert serialization.SCHEMA >= 12


@pytest.mark.parametrize(("kind", "shape"), [("bert", encoder_config.BERT(**BERT_MODEL)), ("t5", encoder_config.T5(**T5_MODEL))])
def test_a_plain_shape_becomes_one_that_refuses_in_our_words(kind: str, shape) -> None:
    assert type(Experiment(**dict(KINDS[kind]()) | {"model": shape}).model) is MODELS[kind]


ELSE = ", and the model is a T5 → leave it out, or change the model in config.py"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.token_types", "2"], f"model.token_types is a setting of BERT{ELSE}"),
        (["--model.rotary_base", "2"], f"model.rotary_base is a setting of GPT{ELSE}"),
        (["--model.norm", "rmsnorm"], f"model.norm is a setting of GPT{ELSE}"),
        (["--model.source_lenght", "2"], "model.source_lenght is not a setting → did you mean model.source_length?"),
        (["--model.kind", "bert"], "model.kind = 'bert' does not work → use t5"),
        (
            ["--model.relative_buckets", "7"],
            "model.relative_buckets = 7 with model.relative_distance = 128 → use an even number of 4 or more, and a distance above half of "
            "it (T5: 32 and 128)",
        ),
        (
            ["--model.start_token", "8192"],
            "model.start_token = 8192 is none of model.vocab_size = 8192 tokens → use 0 to 8191, or leave it out",
        ),
        (["--model.num_heads", "5"], "model.num_heads = 5 does not divide model.hidden_size = 192 → use 1, 2, 3, 4, 6 or 8"),
    ],
)
def test_a_setting_of_another_kind_is_refused(argv: list[str], said: str) -> None:
    assert sentence(lambda: parse(t5(), argv)) == said


def test_settings_of_each_kind_can_be_overridden() -> None:
    changed, overrides, _ = parse(t5(), ["--model.source_length", "32", "--model.num_heads", "3"])
    assert isinstance(changed.model, T5) and changed.model.head_size == 64
    assert overrides == [("model.source_length", 64, 32), ("model.num_heads", 6, 3)]
    assert parse(bert(), ["--model.residual=pre_norm"])[0] == bert(model={"residual": "pre_norm"})


def test_a_saved_t5_of_before_the_start_token_could_be_set_is_loaded() -> None:
    saved = resolved(t5())
    del saved["schema"]
    assert saved["model"].pop("start_token") is None and build(saved) == t5()
    assert parse(t5(), ["--model.start_token", "0"])[0].model.start_token == 0


def test_help_shows_the_settings_of_the_model_that_is_there(capsys) -> None:
    show_help(bert(), "x/launch.py")
    said = capsys.readouterr().out
    assert "--model.token_types " in said and "--model.rotary_base" not in said and "--model.source_length" not in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "gtp"}, "model.kind = 'gtp' is no kind of model → use gpt, bert or t5"),
        ({"kind": "bert"}, "model.num_encoder_layers is not a setting"),
        (3, "model = 3 does not work → use GPT(…) or BERT(…) or T5(…)"),
    ],
)
def test_a_wrong_table_of_a_config_json_is_one_sentence(settings, said: str) -> None:
    given = resolved(t5())
    del given["schema"]
    given["model"] = given["model"] | settings if isinstance(settings, dict) else settings
    assert said in sentence(lambda: build(given))


ONE, TWO = Ranks(0, 0, 1, 1, "python", "localhost", 1, 1), Ranks(0, 0, 9, 9, "deepspeed", "localhost", 1, 1)
SLICED = {"tensor": 2, "sequence": True}
REFUSED: dict[str, tuple[Experiment, str]] = {
    "masked for a GPT": (
        Experiment(**dict(example()) | {"data": bert().data}),
        "data.examples = Masked(…) are samples for a BERT, and the model is a GPT → use stream, ",
    ),
    "windows for a BERT": (
        Experiment(**dict(bert()) | {"data": example().data}),
        "data.examples = 'stream' are samples for a GPT, and the model is a BERT → use masked",
    ),
    "masked for a T5": (
        Experiment(**dict(t5()) | {"data": bert().data}),
        "data.examples = Masked(…) are samples for a BERT, and the model is a T5",
    ),
    "a ramp": (bert(schedule={"length_ramp": (32, 32, 64)}), "schedule.length_ramp shortens windows of the stream"),
    "too many stages": (
        t5(parallel={"pipe": 9}),
        "parallel.pipe = 9 leaves stages without a block of model.num_encoder_layers = 4 and model.num_layers = 4 → use pipe 8 or fewer",
    ),
    "target": (t5(model={"seq_length": 63}, parallel=SLICED), "parallel.tensor = 2 does not divide model.seq_length = 63"),
    "source": (t5(model={"source_length": 63}, parallel=SLICED), "parallel.tensor = 2 does not divide model.source_length = 63"),
    "texts": (
        Experiment(**dict(bert()) | {"sample": {"every": 3}}),
        "sample.every = 3 lets the model write texts, which a BERT cannot do",
    ),
    "tasks": (
        Experiment(**dict(t5()) | {"evaluate": {"every": 3, "tasks": ("validation",)}}),
        "evaluate.every = 3 evaluates a model that continues texts, which a T5 does not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_kind_of_model_is_refused(case: str) -> None:
    experiment, said = REFUSED[case]
    assert said in sentence(lambda: check(experiment, TWO if experiment.parallel.pipe > 1 else ONE))


def test_samples_for_their_kind_are_accepted() -> None:
    fim = FillInMiddle(rate=0.5, spm_rate=0.5, confine=True)
    for experiment in (bert(), t5(), example(data=example().data.model_copy(update={"examples": fim}))):
        check(experiment, ONE)
    assert isinstance(bert().data.examples, Masked)


def test_a_verb_says_what_it_needs_and_what_else_can_be_done() -> None:
    assert {kind for kinds in ABILITIES.values() for kind in kinds} <= {*MODELS}
    refuse_other_kinds("verify", BERT(**BERT_MODEL), "runs/x")
    refuse_other_kinds("generate", example().model, "runs/x")
    said = sentence(lambda: refuse_other_kinds("generate", BERT(**BERT_MODEL), "runs/x"))
    assert said.startswith("generate needs a GPT") and "and runs/x is a BERT → name a run of such a model, or use " in said
    assert isinstance(example().model, GPT)


def test_models_of_two_kinds_differ_in_one_thing() -> None:
    assert diff(t5(), bert())[0] == ("model", "t5", "bert")
    assert [name for name, _, _ in diff(t5(), bert())] == ["model", "data.examples"]
    assert diff(t5(), t5(model={"num_layers": 2})) == [("model.num_layers", 4, 2)]
