"""The description of a step that went wrong: written, read again, and refused where it is somebody's nonsense."""

import pytest

from parallel.errors import Mistake
from research import incidents
from research.incidents import Incident, Suspect
from research.run_folder import RunFolder, create

ONE = Incident(
    step=5,
    kind="non_finite",
    loss="nan",
    grad_norm="inf",
    samples=(32, 40),
    windows=[3, 1, 4],
    checkpoint="step_000003",
    suspects=[Suspect(1, "data 1", ["a.weight", "b.weight"])],
)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return create(tmp_path, "x")


def test_written_and_read_again(folder: RunFolder) -> None:
    incidents.keep(folder, ONE)
    assert incidents.load(folder, 5) == ONE
    assert ONE.said == "step 5: the loss is nan; rank 1 (data 1): a.weight and 1 more"


def test_a_step_without_one_lists_those_there_are(folder: RunFolder) -> None:
    with pytest.raises(Mistake, match="no incident at step 5 → the run had no incident"):
        incidents.load(folder, 5)
    incidents.keep(folder, ONE)
    with pytest.raises(Mistake, match="there are incidents at 5"):
        incidents.load(folder, 6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"suspects": 3, "samples": [1, 2]}', '{"suspects": [], "samples": ["a", 2], "step": 1}'])
def test_nonsense_is_a_sentence(folder: RunFolder, text: str) -> None:
    incidents.keep(folder, ONE)
    incidents.path_of(folder, 5).write_text(text)
    with pytest.raises(Mistake, match="does not describe a step"):
        incidents.load(folder, 5)
