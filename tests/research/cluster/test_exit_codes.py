"""How a Mistake is shown, and which errors of the file system become one."""

import errno
from pathlib import Path

import pytest

from parallel.errors import Damaged, DiskRefuses, FolderLost, Mistake
from parallel.files import disk_trouble
from research.cluster.exit_codes import DAMAGED, DISK, HUNG, TAKEN, WATCHED, WRONG, refuse, refused_files, refusing, sentence


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
