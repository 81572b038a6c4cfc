"""data.train as several sources: what they are called, how they are saved, and that everything that cannot be meant is one sentence."""

import json
import shlex
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research.config import Data, Source, overrides, serialization
from research.config.diff import diff
from research.config.plausibility import contradictions, doubts
from research.config.sources import describe_texts, suggested_name
from tests.research.helpers.example import example

WEB, CODE = Source(path="store:corpora/web/train", weight=0.7), Source(path="code.txt", weight=0.3)
REST = {"validation": "held_out.txt", "tokenizer": "builtin:bytes"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("store:corpora/code/train", "code"),
        ("builtin:state_of_the_union/train", "state_of_the_union"),
        ("texts/code.jsonl.gz", "code"),
        ("store:corpora/web text/x_text_document", "x_text_document"),
        ("train.txt", "train"),
        ("/data/猫.txt", "data"),
        ("/", "text"),
    ],
)
def test_a_source_without_a_name_is_called_as_its_path_suggests(path: str, name: str) -> None:
    assert suggested_name(path) == name == Source(path=path, weight=1.0).name


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "data.train = [] is no text → use the name of a text, several names, or Source(path=…, weight=…)"),
        ("", "data.train = '' is no text → use the name of a text, several names, or Source(path=…, weight=…)"),
        (3, "data.train = 3 is no text → use the name of a text, several names, or Source(path=…, weight=…)"),
        ("a\0b", "data.train = 'a\\x00b' does not work → use text that is not empty and has no zero byte"),
        (["a.txt", 3], "data.train holds 3, which is no name of a text → use names alone, or Source(path=…, weight=…) alone"),
        ([WEB, "a.txt"], "data.train holds 'a.txt', which is no source with a weight → use names alone, or Source(path=…, weight=…) alone"),
        ([{"path": "a", "weight": -1}], "data.train.weight = -1 does not work → use a finite number at least 0"),
        ([{"path": "a", "wieght": 1}], "data.train.wieght is not a setting → did you mean data.train.weight?"),
        ([{"path": "a"}], "data.train.weight is missing → give every setting that has no default"),
        ([{"path": "a", "weight": 1, "name": "a/b"}], "data.train.name = 'a/b' cannot be part of val/NAME/loss → use letters, digits"),
        (
            [Source(path="x/a.txt", weight=1.0), Source(path="y/a.txt", weight=1.0)],
            "data.train has two sources of the name 'a', 'x/a.txt' and 'y/a.txt' → give one of them a name: Source(…, name=…)",
        ),
        ([WEB, WEB], "data.train gives 'web' two weights from step 0 on → leave one of them out, or give it another from_step"),
        (
            [Source(path="a", weight=1.0, validation="v"), Source(path="a", weight=0.5, from_step=9, validation="w")],
            "data.train: 'a' has two held-out texts, 'v' and 'w' → name one",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_sentence(train: object, said: str) -> None:
    with pytest.raises(Mistake) as raised:
        Data(train=train, **REST)
    assert str(raised.value).startswith(said)


def test_sources_are_saved_and_read_back(tmp_path: Path) -> None:
    experiment = example(data=Data(train=(WEB, CODE, Source(path="code.txt", weight=0.0, from_step=9)), **REST))
    serialization.save(experiment, tmp_path / "config.json")
    assert serialization.load(tmp_path / "config.json") == experiment
    assert json.loads((tmp_path / "config.json").read_text())["data"]["train"][1] == {
        **{"path": "code.txt", "weight": 0.3, "from_step": 0, "name": "code", "validation": None}
    }
    assert describe_texts(experiment.data.train) == "0.7 web + 0.3 code, from step 9 on 0 code"
    other = example(data=Data(train=(WEB, CODE), **REST))
    assert [name for name, _, _ in diff(experiment, other)] == ["data.train"]


def test_several_names_are_one_text() -> None:
    assert Data(train=["a.txt", "b"], **REST).train == ("a.txt", "b") and Data(train=["a.txt"], **REST).train == "a.txt"
    changed, said, _ = overrides.parse(example(), ["--data.train", "a.txt", "b c.txt", "--seed", "3"])
    assert changed.data.train == ("a.txt", "b c.txt") and said[0][0] == "data.train"
    assert overrides.parse(changed, ["--data.train", "a.txt"])[0].data.train == "a.txt"


def test_help_shows_the_setting_as_text(capsys: pytest.CaptureFixture) -> None:
    for train, shown in (("a.txt", "a.txt"), (("a.txt", "b.txt"), "a.txt, b.txt"), ((WEB, CODE), "0.7 web + 0.3 code")):
        overrides.show_help(example(data=Data(train=train, **REST)), "launch.py", "data")
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--data.train STR" in said and f"(default: {shlex.quote(shown)})" in said


def test_each_source_is_compared_with_each_held_out_text(tmp_path: Path) -> None:
    for name in ("code.txt", "held_out.txt", "own.txt"):
        (tmp_path / name).write_text(name)
    train = (Source(path="code.txt", weight=1.0, validation="own.txt"), Source(path="./own.txt", weight=1.0, name="b", from_step=5000))
    experiment = example(data=Data(train=train, **REST))
    assert list(contradictions(experiment, tmp_path)) == [
        "the validation of 'code' = 'own.txt' is a text of data.train → name a text that is not trained on"
    ]
    assert list(doubts(experiment)) == [
        "data.train gives 'b' the weight 1 from step 5,000 on, the run ends after 300 → use an earlier step, or more steps"
    ]
