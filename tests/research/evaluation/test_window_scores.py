"""The noise of the held-out text: paired over windows, beside a bootstrap, and the scores that are kept."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import Mistake
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.window_scores import WindowScores, digest, of_checkpoint, stderr_of_difference
from research.tracking.run_folder import RunFolder
from tests.research.helpers.example import example


def test_what_two_models_share_of_a_window_is_no_noise_of_their_difference() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(50, 129, 400)
    hard = random.normal(300.0, 60.0, 400)  # how hard a window is for both
    sides = [[WindowScores("same", tuple(hard + own + random.normal(0, 4, 400)), tuple(tokens)) for _ in range(3)] for own in (0.0, 3.0)]
    found = stderr_of_difference(*sides)
    difference = np.mean([one.nats for one in sides[1]], 0) - np.mean([one.nats for one in sides[0]], 0)
    drawn = random.integers(0, 400, (4000, 400))
    assert found == pytest.approx(np.std(difference[drawn].sum(1) / tokens[drawn].sum(1)), rel=0.05)
    assert found is not None and found < 0.1 * np.std(hard) / np.sqrt(400) / tokens.mean()
    assert stderr_of_difference([WindowScores("same", (1.0,), (9,))], [WindowScores("same", (2.0,), (9,))]) is None
    with pytest.raises(Mistake, match="windows that are not the same"):
        stderr_of_difference([WindowScores("same", (1.0,), (9,))], [WindowScores("other", (2.0,), (9,))])


class Fixed:
    """A scorer that gives every token half a nat, and counts the windows."""

    length, scored = 9, 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.scored += len(requests)
        return [Score((-0.5,) * request.scored, (False,) * request.scored) for request in requests]


def test_scores_are_kept_for_the_same_windows_and_weights(tmp_path: Path) -> None:
    folder, scorer = RunFolder(tmp_path / "gpt" / "abc123"), Fixed()
    checkpoint = folder.checkpoints / "step_000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    windows = [ScoreRequest((1, 2, 3), 2), ScoreRequest((3, 4), 1)]
    assert digest(windows) != digest([ScoreRequest((1, 2, 3), 1), ScoreRequest((3, 4), 1)])

    def scores(of: list[ScoreRequest] = windows) -> WindowScores:
        return of_checkpoint(folder, checkpoint, example().model, of, lambda: scorer)

    assert scores() == scores() == WindowScores(digest(windows), (1.0, 0.5), (2, 1)) and scorer.scored == 2
    scores(windows[:1])
    assert scorer.scored == 3
    (checkpoint / "manifest.json").write_text("{ }")  # other weights
    assert scores().nats == (1.0, 0.5) and scorer.scored == 5
    path = folder.path / "evaluations" / "windows" / "step_000012.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nats": "damaged"}))
    assert scores().nats == (1.0, 0.5) and scorer.scored == 7
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    with pytest.raises(Mistake, match="is a link, and nothing is written through it"):
        scores()
