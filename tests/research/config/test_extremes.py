"""Extreme values of every setting through the command line: each is taken, or refused in one sentence that is quickly there."""

import math
from dataclasses import replace

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cluster.environment import ALONE
from research.cluster.exit_codes import refused_files, sentence
from research.config.experiment_folder import load
from research.config.overrides import parse
from research.config.schema import Experiment
from research.config.settings import LARGEST, names
from research.training.job import dry_run, resolve

QUICK = ("-1", "9" * 400, "a" * 5000)
VALUES = (
    *("9" * 5000, "1e400", str(LARGEST), "0", "1", "3", "0.5", "1e308", "1e-400", "nan", "-inf"),
    *(str(LARGEST + 1), "9" * 20, "1_000", "0x10", "٣", "", "True", "None", "()", "1,2,3", "{}"),
    *("é→😀", "\udcff", "x\0y", "con\nfig", "'", '"', "$HOME", "*", "variant:", "variant:X"),
    *("..", "/", "/dev/null", "/proc/self/mem", "~nobody/x", "builtin:", "builtin:/"),
)
LOADED = load(ROOT / "experiments/gpt_sotu")


def dry_run_with(name: str, value: str) -> str:
    """What `launch.py --NAME=VALUE --dry-run` prints; what it refuses, as the one line that a user sees."""
    try:
        with refused_files():
            experiment, overrides, options = parse(LOADED.experiment, [f"--{name}={value}"])
            world = experiment.parallel.pipe * experiment.parallel.tensor
            ranks = replace(ALONE, world=world, local_world=world)
            return dry_run(resolve(replace(LOADED, experiment=experiment), overrides, ranks, options, []), "unknown", False)
    except Mistake as mistake:
        said = sentence(mistake)
        assert " → " in said and "\n" not in said and len(said) < 900, said
        return said


@pytest.mark.parametrize("values", [QUICK, pytest.param(VALUES, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_every_setting_takes_or_refuses_extreme_values(values: tuple[str, ...]) -> None:
    refused = 0
    for name in names(Experiment):
        for value in values:
            refused += " · dry run · " not in dry_run_with(name, value)
    assert refused > 50  # the walk has met settings that refuse


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("schedule.steps", str(LARGEST + 1), "schedule.steps = 4,294,967,296 is too large → use at most 4,294,967,295"),
        ("seed", "9" * 400, "seed = a number of more than 20 digits is too large → use at most 4,294,967,295"),
        ("model.hidden_size", "9" * 20, "model.hidden_size = 99,999,999,999,999,999,999 is too large → use at most 4,294,967,295"),
    ],
)
def test_a_whole_number_that_is_no_size(name: str, value: str, said: str) -> None:
    assert dry_run_with(name, value) == said


def test_the_number_of_ranks_that_fits_is_found_without_counting_up_to_it() -> None:
    """Two stages of four thousand million tensor ranks, on three nodes: the least common multiple is counted here by math.lcm."""
    from research.config.checks import _launch_with

    unit, nodes = 2 * (LARGEST - 3), 3
    ranks = replace(ALONE, world=nodes, local_world=1, launcher="torchrun")
    assert f"--nproc_per_node {math.lcm(unit, nodes) // nodes}`" in _launch_with(unit, ranks)
