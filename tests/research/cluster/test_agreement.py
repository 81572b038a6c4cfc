"""What ranks must agree on: every kind of difference is named, and folders that hosts do not share are found."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from parallel.errors import SharedMistake
from research.cluster import agreement
from research.cluster.agreement import WAYS_OUT, Claims, check_shared_folder, differences, disagreement, rounding_warnings, unreachable
from research.cluster.rendezvous import Rendezvous
from research.cluster.software import digest_of, experiment_files, library_files
from tests.research.cluster.test_rendezvous import met, ranks_of, said

NAMED: dict[str, dict[str, Any]] = {
    "launch": {"the number of ranks": 4, "--resume": "never"},
    "settings": {"model.num_layers": 2, "parallel.tensor": 1, "data.train": "a.txt", "init_from": None},
    "versions": {"torch": "2.13.0", "Python": "3.11.9"},
    "variables": {"NCCL_ALGO": None},
    "weights": {"init_from = None": "drawn"},
    "library": {"models/mlp.py": "1", "models/norm.py": "2", "parallel/grid.py": "3", "research/launch.py": "4"},
    "experiment": {"config.py": "5"},
    "checkpoint": {"r/step_2/manifest.json": "6"},
    "data": {"the text of data.train": "c" * 64, "the prepared data": "f" * 64},
}
CLAIMS = Claims(0, "a", "machine a", "10.0.0.1", "eth0", NAMED, {"threads": "4", "processor": "x86_64 AVX2"})


def other(rank: int = 2, host: str = "b", rounding: dict[str, str] | None = None, **changes: dict[str, Any]) -> Claims:
    """The claims of a rank that differs in `changes`: kind=names that differ; a value of `...` is left out."""
    named = {kind: {**values, **changes.get(kind, {})} for kind, values in NAMED.items()}
    named = {kind: {name: value for name, value in values.items() if value is not ...} for kind, values in named.items()}
    return replace(CLAIMS, rank=rank, host=host, machine=f"machine {host}", named=named, rounding=CLAIMS.rounding | (rounding or {}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"settings": {"model.num_layers": 3}},
            "rank 2 on b has model.num_layers = 3, rank 0 on a has 2 → give every host the same config.py",
        ),
        (
            {"settings": {"model.num_layers": 3, "parallel.tensor": 2, "data.train": "b.txt", "init_from": "runs/x"}},
            "rank 2 on b has model.num_layers = 3, rank 0 on a has 2; parallel.tensor = 2, not 1; data.train = b.txt, not a.txt and 1 more",
        ),
        ({"launch": {"--resume": "auto"}}, "rank 2 on b has --resume = auto, rank 0 on a has never → start the same launch command"),
        ({"launch": {"the number of ranks": 2}}, "rank 2 on b has the number of ranks = 2, rank 0 on a has 4 → "),
        ({"versions": {"torch": "2.12.0"}}, "rank 2 on b has torch = 2.12.0, rank 0 on a has 2.13.0 → install the same"),
        ({"variables": {"NCCL_ALGO": "Ring"}}, "rank 2 on b has NCCL_ALGO = Ring, rank 0 on a has none → set it alike"),
        ({"library": {"models/mlp.py": "x"}}, "rank 2 on b has another models/mlp.py than rank 0 on a → copy the tree"),
        (
            {"library": {"models/mlp.py": "x", "models/norm.py": "y", "parallel/grid.py": "z", "research/launch.py": "w"}},
            "rank 2 on b has another models/mlp.py than rank 0 on a, and so models/norm.py, parallel/grid.py and 1 more files → ",
        ),
        ({"library": {"models/norm.py": ...}}, "rank 2 on b has no models/norm.py → copy the tree"),
        ({"experiment": {"variant.py": "v"}}, "rank 2 on b has variant.py, which rank 0 on a has not → copy the experiment's folder"),
        (
            {"experiment": {"config.py": "x"}, "settings": {"model.num_layers": 3}},
            "rank 2 on b has model.num_layers = 3, rank 0 on a has 2 (the experiment differ too) → give every host the same config.py",
        ),
        ({"checkpoint": {"r/step_2/manifest.json": "x"}}, "rank 2 on b has another r/step_2/manifest.json than rank 0 on a → put the run"),
        ({"checkpoint": {"r/step_2/manifest.json": None}}, "rank 2 on b has no r/step_2/manifest.json → put the run that is to be resumed"),
        (
            {"data": {"the text of data.train": "d" * 64, "the prepared data": "e" * 64}},
            f"rank 2 on b has the text of data.train = SHA-256 {'d' * 16}, rank 0 on a has SHA-256 {'c' * 16}; the prepared data = SHA-256 "
            f"{'e' * 16}, not SHA-256 {'f' * 16} → give all hosts the same files",
        ),
    ],
)
def test_every_difference_is_named_with_both_values(changes: dict[str, Any], sentence: str) -> None:
    assert (disagreement([CLAIMS, other(1, "a"), other(**changes), other(3)]) or "").startswith(sentence)


def test_all_differences_are_promised_only_where_they_are_shown() -> None:
    """--check-cluster neither resumes a run nor prepares its text."""
    shown = {kind: "--check-cluster" in (disagreement([CLAIMS, other(1, **{kind: {"more": "x"}})]) or "") for kind in WAYS_OUT}
    assert [kind for kind, promised in shown.items() if not promised] == ["checkpoint", "data"]


def test_equal_claims_are_no_disagreement_whatever_the_host() -> None:
    assert disagreement([CLAIMS, other(1, "a"), other(2, "b")]) is None


def test_a_name_is_reported_once_with_the_first_rank_that_differs() -> None:
    found = differences([CLAIMS, other(1), other(2, settings={"parallel.tensor": 2}), other(3, settings={"parallel.tensor": 4})])
    assert [(each.name, each.claims.rank, each.claimed, each.expected) for each in found] == [("parallel.tensor", 2, 2, 1)]


def test_what_changes_rounding_alone_is_a_warning() -> None:
    assert rounding_warnings([CLAIMS, other(1), other(2)]) == []
    warnings = rounding_warnings([CLAIMS, other(1), other(2, rounding={"threads": "8", "processor": "aarch64 DEFAULT"})])
    assert warnings[0].startswith(
        "rank 2 on b has threads = 8, rank 0 on a has 4: results are equal within rounding only → set OMP_NUM_THREADS"
    )
    assert warnings[1].startswith("rank 2 on b has processor = aarch64 DEFAULT") and len(warnings) == 2


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.1.1", "stands for 127.0.1.1"), ("", "cannot be resolved"), ("::1", "stands for ::1")]
)
def test_a_host_that_gives_the_others_its_loopback_is_named_with_the_variable(address: str, said: str) -> None:
    alone = [replace(CLAIMS, address=address), replace(other(1, "a"), machine=CLAIMS.machine, address=address)]
    assert unreachable(alone) is None, "on one machine it works"
    found = unreachable([CLAIMS, replace(other(), address=address)])
    assert found and found.startswith("the name of host b ") and said in found and "→ set GLOO_SOCKET_IFNAME=eth0" in found


def claims_on(rendezvous: Rendezvous, layers: int) -> Claims:
    rank = rendezvous.ranks.rank
    return agreement.claims_of(
        rendezvous.ranks, rendezvous.host, {"model.num_layers": layers}, {"--resume": "never"}, {}, {"a.py": "1"}, {"r": rank * 0}
    )


def test_ranks_that_agree_go_on_and_ranks_that_do_not_are_refused(capsys) -> None:
    assert met(4, lambda rendezvous: agreement.agree(rendezvous, claims_on(rendezvous, 2))) == [[]] * 4
    found = met(4, lambda rendezvous: agreement.agree(rendezvous, claims_on(rendezvous, 2 + rendezvous.ranks.rank // 3)))
    assert said(found).startswith("rank 3 on b has model.num_layers = 3, rank 0 on a has 2 → ")
    assert capsys.readouterr().err.count("error  ") == 1


def test_a_folder_that_all_share_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "new/runs"
    for _ in range(2):
        assert met(4, lambda rendezvous: check_shared_folder(rendezvous, folder, "track.runs")) == [None] * 4
        assert list(tmp_path.iterdir()) == ([] if not folder.exists() else [tmp_path / "new"])
        folder.mkdir(parents=True, exist_ok=True)
    assert list(folder.iterdir()) == []


def test_a_folder_that_one_host_does_not_see_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    folder, read = tmp_path / "runs", agreement._read_and_write
    monkeypatch.setattr(agreement, "NONCE_SECONDS", 0.2)

    def on_its_own_disk(folder: Path, nonce: str, rank: int) -> str:
        return read(tmp_path / "another" if rank >= 2 else folder, nonce, rank)

    monkeypatch.setattr(agreement, "_read_and_write", on_its_own_disk)
    found = met(4, lambda rendezvous: check_shared_folder(rendezvous, folder, "track.runs"))
    expected = f"the hosts do not share {folder}: rank 0 on a has written to it, rank 2 on b (and 1 more ranks) does not see .shared-"
    assert said(found).startswith(expected) and said(found).endswith("or set track.runs to a folder on one")
    assert list(tmp_path.iterdir()) == []


def test_another_disk_at_the_same_path_is_not_the_shared_one(tmp_path: Path, monkeypatch) -> None:
    """A file of that name is there, and a disk that cannot be written is none either."""
    monkeypatch.setattr(agreement, "NONCE_SECONDS", 0.2)
    agreement.nonce_path(tmp_path, "n").write_text("other")
    assert agreement._read_and_write(tmp_path, "n", 1) == "does not see .shared-n there (another content)"
    agreement.nonce_path(tmp_path, "n").write_text("n")
    assert agreement._read_and_write(tmp_path, "n", 1) == "" and [path.name for path in tmp_path.iterdir()] == [".shared-n"]
    agreement.nonce_path(tmp_path, "n.1").mkdir()
    assert agreement._read_and_write(tmp_path, "n", 1).startswith("may read it but not write to it (")


def test_a_file_that_a_network_file_system_shows_late_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    folder, path = tmp_path / "runs", agreement.nonce_path
    held = threading.Event()

    def late(folder: Path, nonce: str) -> Path:
        """Rank 0 writes under another name; the file gets its own name half a second later."""
        if threading.current_thread().name.startswith("late") or held.is_set():
            return path(folder, nonce)
        held.set()
        hidden = path(folder, nonce).with_name("hidden")
        threading.Timer(0.5, lambda: hidden.rename(path(folder, nonce))).start()
        return hidden

    monkeypatch.setattr(agreement, "nonce_path", late)
    rendezvous = Rendezvous(ranks_of(0, 1), dist.HashStore(), 20.0, host="a")
    check_shared_folder(rendezvous, folder, "track.runs")
    assert held.is_set() and not folder.exists()


def test_files_are_told_apart_by_content_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / ".venv").mkdir()
    for name, text in {
        "models/a.py": "x = 1\n",
        "models/b.py": "x = 2\n",
        "config.py": "c\n",
        ".venv/c.py": "",
        "models/notes.txt": "",
    }.items():
        (tmp_path / name).write_text(text)
    before = library_files(tmp_path)
    assert [*before] == ["models/a.py", "models/b.py"] and [*experiment_files(tmp_path)] == ["config.py", "models/a.py", "models/b.py"]
    (tmp_path / "models/a.py").write_text("x = 2\n")
    (tmp_path / "models/b.py").write_text("x = 1\n")
    assert {*library_files(tmp_path).values()} == {*before.values()} and digest_of(library_files(tmp_path)) != digest_of(before)


def test_a_shared_mistake_is_a_mistake_with_a_code_of_its_own() -> None:
    mistake = SharedMistake("a → b", reports=True, code=124)
    assert (str(mistake), mistake.reports, mistake.code, SharedMistake("a", False).code) == ("a → b", True, 124, 2)
