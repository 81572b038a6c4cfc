"""Two hosts that differ: the launch is refused before a model is built, in one sentence that names the host and what differs, and all end.

The hosts are two processes here, as two nodes of srun's would be: nothing but the ranks themselves ends both.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.research.helpers.launches import Launch, Place
from tests.research.helpers.two_hosts import launch, tree

pytestmark = pytest.mark.slow
LIMIT = 120.0
"""Far below hang_seconds and the 30 minutes of a collective; a launch takes ten to thirty seconds on a busy machine."""
DATA = {"parallel__tensor": 1, "schedule__micro_batch_size": 2}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def refused(begun: Launch, place: Place, said: str, codes: set[int] = frozenset({2})) -> str:  # type: ignore[assignment]
    """Both ranks end with one of `codes`, the sentence is shown once, no traceback, and no run is left."""
    ended = begun.wait(LIMIT)
    text = ended.err
    assert {process.returncode for process in begun.processes} <= codes, text
    assert said in text and text.count("error  ") == 1 and "Traceback" not in text, text
    assert not list(place.runs.rglob("run.json")) and not list(place.runs.rglob(".shared*")), text
    return text


GELU = ("models/mlp.py", "F.gelu", "F.relu")


def test_other_code_without_git(place: Place, tmp_path: Path) -> None:
    trees = tree(tmp_path / "a"), tree(tmp_path / "b", GELU)
    text = refused(launch(place, trees, **DATA), place, "rank 1 on ")
    assert "has another models/mlp.py than rank 0 on " in text and "→ copy the tree to every host" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.num_layers", "3"], "has model.num_layers = 3, rank 0 on "),
        (["--parallel.tensor", "2", "--schedule.micro_batch_size", "4"], "parallel.tensor = 2"),
        (["--resume", "auto"], "has --resume = auto, rank 0 on "),
    ],
)
def test_another_command_line(place: Place, words: list[str], said: str) -> None:
    """Of these, another number of layers or another tensor size would hang in the first collective."""
    refused(launch(place, words=([], words), watch__hang_seconds=600, **DATA), place, said)


def test_another_variable(place: Place) -> None:
    environs = ({}, {"ATEN_CPU_CAPABILITY": "default"})
    refused(launch(place, environs=environs, **DATA), place, "has ATEN_CPU_CAPABILITY = default, rank 0 on ")


def test_another_file_of_the_experiment(place: Place, tmp_path: Path) -> None:
    trees = tree(tmp_path / "a"), tree(tmp_path / "b")
    (trees[1] / "experiments/gpt_sotu/variant.py").write_text("x = 1\n")
    refused(launch(place, trees, **DATA), place, "has variant.py, which rank 0 on ")


@pytest.mark.parametrize("victim", [0, 1])
def test_the_data_are_missing_on_one_host(place: Place, tmp_path: Path, victim: int) -> None:
    """`data.train` is relative to the tree, and one tree lacks it."""
    trees = tree(tmp_path / "a"), tree(tmp_path / "b")
    (trees[1 - victim] / "text.txt").write_text(place.train.read_text())
    begun = launch(place, trees, data__train="text.txt", **DATA)
    text = refused(begun, place, "data.train = 'text.txt'")
    assert f"error  (rank {victim} on " in text


def test_a_variant_that_does_not_import_on_one_host(place: Place, tmp_path: Path) -> None:
    trees = tree(tmp_path / "a"), tree(tmp_path / "b")
    good = "from models.norm import LayerNorm\nclass Mine(LayerNorm):\n    pass\n"
    for path, head in zip(trees, ("", "import no_such_module\n"), strict=True):
        (path / "experiments/gpt_sotu/variant.py").write_text(head + good)
    text = refused(launch(place, trees, model__norm="variant:Mine", **DATA), place, "error  (rank 1 on ")
    assert "variant.py:1: ModuleNotFoundError: No module named 'no_such_module'" in text


def test_check_cluster_shows_every_difference_and_writes_nothing(place: Place, tmp_path: Path) -> None:
    trees = tree(tmp_path / "a"), tree(tmp_path / "b", GELU)
    begun = launch(place, trees, options=["--check-cluster"], words=([], ["--model.num_layers", "3"]), **DATA)
    refused(begun, place, "has model.num_layers = 3, rank 0 on ")
    assert not place.runs.exists()
    shown = [line.split() for line in begun.said().splitlines()]
    assert any(words[:2] == ["model.num_layers", "2"] for words in shown) and any(
        words[:2] == ["models/mlp.py", "SHA-256"] for words in shown
    )


def test_check_cluster_of_equal_hosts_times_the_links(place: Place, tmp_path: Path) -> None:
    ended = launch(place, options=["--check-cluster"], **DATA).wait(LIMIT)
    assert ended.code == 0 and ended.err == "" and not place.runs.exists(), ended.err
    assert "agree · checked in " in ended.out and any(line.startswith("data ") and line.endswith("GB/s") for line in ended.out.splitlines())
    assert all(len(line) <= 80 for line in ended.out.splitlines()), ended.out


def test_a_host_that_does_not_come(place: Place) -> None:
    begun = launch(place, hosts=(0,), watch__rendezvous_seconds=4, watch__hang_seconds=1, **DATA)
    refused(begun, place, "rank 1 of node b has not come after 4 s, 1 of 2 ranks are there (on ", {124})


def test_the_first_host_does_not_come(place: Place) -> None:
    begun = launch(place, hosts=(1,), watch__rendezvous_seconds=3, watch__hang_seconds=1, **DATA)
    refused(begun, place, "cannot reach rank 0 at 127.0.0.1:", {124})


def test_torchrun_on_two_nodes_says_it_in_both_terminals(place: Place, tmp_path: Path) -> None:
    trees = tree(tmp_path / "a"), tree(tmp_path / "b", GELU)
    begun = launch(place, trees, launcher="torchrun", restarts=1, **DATA)
    ended = begun.wait(LIMIT * 2)
    for stream in begun.streams:  # and once more after the restart, for which torchrun uses the same store
        assert stream.with_suffix(".err").read_text().count("has another models/mlp.py than rank 0 on ") == 2, ended.err
    assert "two processes" not in ended.err
    assert not list(place.runs.rglob("run.json"))


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_equal_hosts_train_with_the_smallest_limits(place: Place, tmp_path: Path, launcher: str) -> None:
    """The start-up takes much longer than hang_seconds, and two trees at different paths with equal content are equal."""
    settings: dict[str, Any] = {"watch__hang_seconds": 2, **DATA}
    trees = tree(tmp_path / "a"), tree(tmp_path / "b", ("experiments/gpt_sotu/config.py", "", ""))
    ended = launch(place, trees, launcher=launcher, **settings).wait(LIMIT * 2)
    assert ended.code == 0 and len(ended.column("train/loss")) == 6, ended.err
