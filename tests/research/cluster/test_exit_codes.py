"""How a Mistake is shown, and which errors of the file system become one."""

import errno
import re
import subprocess
from pathlib import Path

import pytest

from parallel.errors import Damaged, DiskRefuses, FolderLost, Mistake
from parallel.files import disk_trouble
from research import ROOT
from research.cluster.exit_codes import (
    CRASHED,
    DAMAGED,
    DISK,
    HUNG,
    NOT_AGAIN,
    TAKEN,
    WATCHED,
    WRONG,
    refuse,
    refused_files,
    refusing,
    sentence,
)
from research.cluster.slurm import SlurmJob, script


def test_a_mistake_is_one_line_whatever_value_it_shows() -> None:
    assert sentence(Mistake("a\nb\r → c")) == "a\\nb\\r → c"
    long = sentence(Mistake(f"data.train = {'a' * 4000}z does not exist → use another"))
    assert long == f"data.train = {'a' * 60}…{'a' * 19}z does not exist → use another"
    path = "/".join(["folder"] * 40)
    assert sentence(Mistake(f"{path} → x")) == f"{path} → x"


def test_an_error_that_names_a_file_is_a_mistake(tmp_path) -> None:
    with pytest.raises(Mistake, match="missing cannot be used .No such file or directory. → check the path"), refused_files():
        (tmp_path / "missing").read_bytes()
    with pytest.raises(Mistake, match="cannot be used .File name too long."), refused_files():
        (tmp_path / ("a" * 5000)).is_file()
    with pytest.raises(OSError) as kept, refused_files():
        raise OSError(errno.EIO, "broken")
    assert kept.value.errno == errno.EIO


def test_refusing_ends_with_exit_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as left, refusing():
        raise Mistake("a → b")
    assert left.value.code == 2 and capsys.readouterr().err == "error  a → b\n"


def test_kinds_of_mistakes_have_codes_of_their_own(tmp_path, capsys) -> None:
    """supervise waits for one, sets checkpoints aside for another, and stops at all others."""
    for mistake, code in (
        (Mistake("a → b"), WRONG),
        (Damaged("a → b"), DAMAGED),
        (DiskRefuses("a → b"), DISK),
        (FolderLost("a → b"), TAKEN),
    ):
        with pytest.raises(SystemExit) as left, refusing():
            raise mistake
        assert left.value.code == code
    with pytest.raises(SystemExit) as left:
        refuse(DiskRefuses("a → b"), rank=1, patience=1e9)  # no other rank reports what is wrong with the disk of this one
    assert left.value.code == DISK
    assert len({WRONG, DAMAGED, DISK, TAKEN, WATCHED, HUNG}) == 6
    capsys.readouterr()


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskRefuses), (errno.EDQUOT, DiskRefuses), (errno.EACCES, Mistake)])
def test_a_full_disk_is_told_from_a_wrong_path(number: int, kind: type[Mistake]) -> None:
    with pytest.raises(Mistake) as refused, refused_files():
        raise OSError(number, "refused", "path")
    assert type(refused.value) is kind
    with pytest.raises(Mistake) as refused, disk_trouble(Path("path"), 1):
        raise OSError(number, "refused", "path")
    assert type(refused.value) is kind


def test_the_script_for_slurm_requeues_after_every_code_but_those_that_would_come_again() -> None:
    """The printed script's own `case`, run by a shell, against the table of docs/clusters.md."""
    job = SlurmJob("gpt", Path("/work"), Path("runs"), ["launch.py"], [], 2, 4, True, "", "python", "gpt")
    (case,) = re.findall(r"^case .*?^esac", script(job), re.M | re.S)
    codes = (0, CRASHED, *NOT_AGAIN, DISK, DAMAGED, HUNG, 138, 143)
    shell = f"for code in {' '.join(map(str, codes))}; do ({case}; exit 99); echo $code $?; done"
    ended = dict(map(int, line.split()) for line in subprocess.check_output(["bash", "-c", shell], text=True).splitlines())
    table = (ROOT / "docs/clusters.md").read_text().partition("| exit code of `srun` |")[2].partition("\n\n")[0]
    ends = {int(code) for line in table.splitlines() if "| ends" in line for code in re.findall(r"\b\d+\b", line.partition(":")[0])}
    requeues = {int(code) for line in table.splitlines() if "| requeues" in line for code in re.findall(r"\b\d+\b", line.partition(":")[0])}
    assert {code for code, left in ended.items() if left == code} == ends == {0, *NOT_AGAIN}
    assert {code for code, left in ended.items() if left == 99} - {CRASHED, HUNG} == requeues
