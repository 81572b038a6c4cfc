"""Every launcher starts the same experiment from any folder, and neither the launcher nor the layout changes a number."""

import pytest

from tests.research.helpers.launches import ROOT, Ended, Place, run

EQUAL = 2e-5
"""Largest relative difference of two layouts' losses in fp32."""
COMPARED = ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte")
OTHER_WAYS = [
    ("python", 1, False, {}),
    ("deepspeed", 2, True, {"parallel__zero_stage": 3}),
    ("torchrun", 2, True, {"parallel__tensor": 2}),
    ("srun", 2, False, {"parallel__pipe": 2}),
    ("deepspeed", 1, True, {"parallel__zero_stage": 2, "parallel__offload_optimizer": True}),
]


def assert_same_experiment(found: Ended, expected: Ended) -> None:
    """All numbers that do not depend on the clock are equal, row by row."""
    assert found.code == 0, found.err
    assert found.status == "finished"
    for key in COMPARED:
        assert found.column(key) == pytest.approx(expected.column(key), rel=EQUAL), key
    for key in ("train/lr", "progress/step", "progress/tokens", "progress/samples", "progress/applied_steps"):
        assert found.column(key) == expected.column(key), key


@pytest.mark.parametrize(("launcher", "layout"), [("deepspeed", (1, 1, 2)), ("torchrun", (2, 1, 1)), ("srun", (1, 2, 1))])
def test_the_launcher_and_the_layout_change_nothing(launcher: str, layout: tuple, alone: Ended, by_launcher: dict[str, Ended]) -> None:
    found = by_launcher[launcher]
    assert found.code == 0, found.err
    assert "layout   pipe {} × data {} × tensor {} · ZeRO-1 · fp32\n".format(*layout) in found.out
    assert "machine  1 node × 2 ranks · cpu" in found.out
    assert len(alone.column("train/loss")) == 6
    assert alone.column("train/loss")[-1] < alone.column("train/loss")[0] - 0.1, "it learns nothing, so equality says nothing"
    assert max(alone.column("train/grad_norm")) > 1, "the clip never binds, so a wrong norm would not show"
    assert_same_experiment(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ranks", "at_root", "changes"), OTHER_WAYS)
def test_other_ways_to_start_it(launcher, ranks, at_root, changes, place: Place, alone: Ended, elsewhere) -> None:
    found = run(place, launcher, ranks, cwd=ROOT if at_root else elsewhere, **changes)
    assert_same_experiment(found, alone)


@pytest.mark.slow
def test_the_3d_experiment_on_four_ranks(place: Place, alone: Ended, elsewhere) -> None:
    found = run(place, "deepspeed", 4, "gpt_sotu_3d", elsewhere)
    assert found.code == 0, found.err
    assert "layout   pipe 2 × data 1 × tensor 2 · ZeRO-1 · fp32\n" in found.out
    assert_same_experiment(found, alone)
