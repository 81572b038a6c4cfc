"""Files of strangers: each ends its verb with one sentence, in little memory, and makes it neither write elsewhere nor execute anything."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from parallel.text import is_unseen
from tests.research.helpers import gguf_files, hf_models, untrained
from tests.research.helpers.hostile_cases import SECRET, Bases, Case
from tests.research.helpers.hostile_gguf import gguf_cases
from tests.research.helpers.hostile_models import hf_cases, tokenizer_cases
from tests.research.helpers.hostile_runs import checkpoint_cases, run_cases
from tests.research.helpers.hostile_settings import settings_cases
from tests.research.helpers.watched_verbs import Watched, watched

KINDS = {
    "hf": hf_cases,
    "tokenizer": tokenizer_cases,
    "gguf": gguf_cases,
    "checkpoint": checkpoint_cases,
    "run": run_cases,
    "settings": settings_cases,
}
MOST_MB, LONGEST = 300, 20_000
"""What a verb may add to its memory, and the characters that it may print."""
QUICK = (
    "hf: config.json is a pipe", "hf: config.json is a link to a secret", "hf: max_position_embeddings is huge",
    "gguf: an array of 2^40 numbers", "tokenizer: 30 doublings", "checkpoint: manifest.json is a pipe", "run: variant.py is a program",
    "run: run.json is a pipe (runs)", "run: layout is long (inspect)", "run: data.train is a secret (generate)",
    "settings: DeepSpeed's csv_monitor writes elsewhere",
)  # fmt: skip
"""Beginnings of names: one of each kind, in the quick suite."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    """Good ones. Everything that a verb imports is imported here: a child is forked with it."""
    import transformers
    import transformers.integrations.gguf  # noqa: F401

    import research.cli.data
    import research.cli.evaluate
    import research.cli.generate
    import research.cli.inspect
    import research.cli.plot
    import research.cli.replay
    import research.cli.runs
    import research.cli.track
    import research.exchange.importer
    import research.generation.restore  # noqa: F401

    place = tmp_path_factory.mktemp("bases")
    run = untrained.make(place)
    model = hf_models.their_folder(place / "hf", "llama, grouped")
    return Bases(model, gguf_files.write(place / "m.gguf"), run.path)


def cases(bases: Bases) -> list[Case]:
    """All of them."""
    return [case for of_kind in KINDS.values() for case in of_kind(bases)]


def run_case(case: Case, place: Path) -> Watched:
    """Makes the file in a folder with a secret beside it, and runs its verb."""
    place.mkdir()
    hf_models.tree(place)
    (place / "secret.json").write_text(f'{{"model_type": "{SECRET}"}}')
    (place / "secret.txt").write_text(f"{SECRET}\n" * 500)
    return watched(case.make(place), place)


def faults(case: Case, done: Watched, place: Path) -> list[str]:
    """What the verb did that it must not do."""
    found = []
    lines = [line for line in done.err.splitlines() if line.startswith("error  ")]
    if done.code not in (0, 1, 2) or "Traceback" in done.err:
        found.append(f"exit code {done.code}: {done.err[-600:]}")
    if done.code == 2 and len(lines) != 1:
        found.append(f"{len(lines)} sentences: {done.err[-400:]}")
    if case.shown and done.code != 0 and "run.json: " not in done.err:
        found.append(f"ends with {done.code}: {done.err[-400:]}")
    said = done.out + done.err
    if steering := {letter for letter in said if is_unseen(letter)}:
        found.append(f"prints {ascii(steering)}")
    if len(said) > LONGEST:
        found.append(f"prints {len(said)} characters")
    if done.added_mb > MOST_MB:
        found.append(f"takes {done.added_mb:.0f} MB")
    if done.wrote or done.executed:
        found.append(f"writes {done.wrote[:3]}, executes {done.executed[:3]}")
    if (place / "ran").exists() or (place / "elsewhere").exists() and any((place / "elsewhere").iterdir()):
        found.append("what the stranger named was made")
    if SECRET in said or any(SECRET in path.read_text(errors="replace") for path in _files_made(place)):
        found.append("a secret was read")
    return found


def _files_made(place: Path) -> list[Path]:
    """The small files below the folders in which a verb may write."""
    found = [path for name in ("tree/experiments", "tmp") for path in (place / name).rglob("*")]
    return [path for path in found if path.is_file() and not path.is_symlink() and path.stat().st_size < 10**6]


def checked(chosen: list[Case], place: Path) -> dict[str, Watched]:
    """Runs the cases one after the other; fails with all faults at once."""
    results, wrong = {}, []
    for i, case in enumerate(chosen):
        here = place / f"{i}"
        done = results[case.name] = run_case(case, here)
        wrong += [f"{case.name}: {fault}" for fault in faults(case, done, here)]
        shutil.rmtree(here)
    assert not wrong, "\n".join(wrong)
    return results


def test_one_of_each_kind(bases, tmp_path):
    chosen = [case for case in cases(bases) if case.name.startswith(QUICK)]
    assert [beginning for beginning in QUICK if not any(case.name.startswith(beginning) for case in chosen)] == []
    checked(chosen, tmp_path)


@pytest.mark.slow
def test_there_are_hundreds_and_each_has_a_name(bases):
    names = [case.name for case in cases(bases)]
    assert len(names) >= 700 and [name for name, count in Counter(names).items() if count > 1] == []
    assert {name.partition(":")[0] for name in names} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_file_is_one_sentence(kind, bases, tmp_path):
    """`pytest -s` prints how many there are of a kind, and the largest figures."""
    done = checked([*KINDS[kind](bases)], tmp_path)
    for figure in ("seconds", "cpu_seconds", "added_mb"):
        worst = sorted(done, key=lambda name: -getattr(done[name], figure))[:5]
        print(f"\n{figure}: " + "; ".join(f"{getattr(done[name], figure):.1f} {name}" for name in worst))
    refused = sum(one.code == 2 for one in done.values())
    print(f"\n{len(done)} cases, {refused} refused, {sum(one.code == 0 for one in done.values())} read or shown")
