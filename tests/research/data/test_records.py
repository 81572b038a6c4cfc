"""What was found in a file is found again only if the file may have changed, by one process at a time."""

import json
import os
import threading
import time

import pytest

from parallel.errors import Mistake
from research.data import records
from research.data.records import Cache, silent
from tests.research.data.conftest import settle
from tests.research.data.test_prepare import noting


@pytest.fixture
def look(tmp_path):
    """look(**cache): what is remembered of the file `text`, whose content is what is to be found."""
    text, folder = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    text.write_text("one")
    settle(text)

    def find():
        return {"content": text.read_text()}

    return lambda **settings: Cache(folder, silent, **settings).remembered("kind", [text], "reading text", find)["content"]


def rewrite(path, content):
    """Another content of the same size and modification time."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_text(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_is_read_again_if_size_or_time_has_changed_or_it_is_asked_for(tmp_path, look):
    assert look() == "one"
    rewrite(tmp_path / "text", "two")
    assert look() == "one", "it was not read"
    launch = time.time_ns()
    assert look(believe_since_ns=launch) == "two", "--rehash"
    assert look() == "two"
    rewrite(tmp_path / "text", "six")
    assert look(believe_since_ns=launch) == "two", "another rank of this launch has read it"
    rewrite(tmp_path / "text", "two")
    rewrite(tmp_path / "text", "six")
    os.utime(tmp_path / "text", ns=(0, 0))
    assert look() == "six"
    (tmp_path / "text").write_text("three")
    assert look() == "three"


def test_a_file_that_has_just_changed_is_not_believed_at_the_next_start(tmp_path, look):
    """It could change again within the same tick of its file system's clock."""
    now = time.time_ns()
    os.utime(tmp_path / "text", ns=(now, now))
    assert look() == "one"
    rewrite(tmp_path / "text", "two")
    assert look() == "two"


def test_a_long_file_that_has_just_changed_is_given_time_to_settle(tmp_path, look, monkeypatch):
    monkeypatch.setattr(records, "LONG", 2)
    monkeypatch.setattr(records, "SETTLED_NS", 10**8)
    now = time.time_ns()
    os.utime(tmp_path / "text", ns=(now, now))
    assert look() == "one"
    rewrite(tmp_path / "text", "two")
    assert look() == "one"


def test_a_record_that_is_damaged_is_made_again(tmp_path, look):
    assert look() == "one"
    (record,) = (tmp_path / "cache").glob("kind-*.json")
    for damaged in ("", "{}", "[]", json.dumps({"began_ns": "x", "found": {}}), json.dumps({"began_ns": 1, "found": 5})):
        record.write_text(damaged)
        assert look() == "one" and json.loads(record.read_text())["found"] == {"content": "one"}


def test_an_error_leaves_no_record(tmp_path):
    def find():
        raise Mistake("it is broken → mend it")

    (tmp_path / "text").write_text("x")
    with pytest.raises(Mistake, match="mend"):
        Cache(tmp_path, silent).remembered("kind", [tmp_path / "text"], "reading", find)
    assert not list(tmp_path.glob("*.json"))


def test_a_process_that_waits_says_for_what(tmp_path, monkeypatch, caplog):
    """It waits as long as another has the lock; what that one finds is not looked for again."""
    text, said, cache = tmp_path / "text", [], tmp_path / "cache"
    cache.mkdir()
    text.write_text("x")
    settle(text)
    first, second = Cache(cache, silent), Cache(cache, noting(said))
    monkeypatch.setattr("parallel.files.SHORT_WAIT", 0.01)
    caplog.set_level("INFO")
    asked, release = threading.Event(), threading.Event()

    def slow():
        asked.set()
        assert release.wait(60)
        return {"by": "first"}

    def never():
        raise AssertionError("the other process has found it")

    holder = threading.Thread(target=lambda: first.remembered("kind", [text], "reading x", slow))
    holder.start()
    assert asked.wait(60)
    found = []
    waiter = threading.Thread(target=lambda: found.append(second.remembered("kind", [text], "reading x", never)))
    asked_at = time.monotonic()
    waiter.start()
    while not said and time.monotonic() < asked_at + 60:
        time.sleep(0.01)
    assert said == ["waiting for another process: reading x"] and not found
    release.set()
    waiter.join(60)
    holder.join(60)
    assert found == [{"by": "first"}]
    assert "waiting for another process: reading x" in caplog.text
