"""The folder data.cache: whose fault an error of the file system is."""

import errno

import pytest

from parallel.errors import Mistake
from research.data.text_stores import cache_folder


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("text.txt", r"text.txt cannot be read \(Permission denied\) → make it readable, or name another file"),
        ("cache/store.bin", r"data.cache = 'cache' cannot be used \(.*cache/store.bin.*\) → name a folder that you may write to"),
        (None, r"data.cache = 'cache' cannot be used \(.*Permission denied\) → name a folder that you may write to"),
    ],
)
def test_an_error_names_the_file_or_the_cache(tmp_path, file, said):
    with pytest.raises(Mistake, match=said), cache_folder("cache", tmp_path):
        raise OSError(errno.EACCES, "Permission denied", *([str(tmp_path / file)] if file else []))


def test_a_cache_without_a_home_is_one_sentence(tmp_path):
    with pytest.raises(Mistake, match=r"~nobody-here/x: nobody here has the home ~nobody-here"), cache_folder("~nobody-here/x", tmp_path):
        pass
