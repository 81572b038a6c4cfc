"""The command line of `serve`: what it refuses, in sentences, before torch is imported; what it takes for granted."""

import socket
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")

from parallel.errors import Mistake
from research.serving import task as task_file
from research.serving.task import cache_bytes, parser, prepared
from tests.research.runs import ROOT


def prepare(small, *words: str):
    task = prepared(parser().parse_args([str(small.path), "--port", "0", *words]))
    task.listener.close()
    return task


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and there is no token → add --token_file TOKEN"),
        (["--host", "no.such.host.invalid"], "there is no token"),
        (["--token_file", "/nothing"], "cannot be read"),
        (["--port", "70000"], "--port 70000 does not work"),
        (["--slots", "0"], "--slots 0 does not work"),
        (["--logprobs", "200"], "--logprobs 200 does not work → use 100 or less"),
        (["--queue", "0"], "--queue 0 does not work"),
        (["--request_seconds", "-1"], "--request_seconds -1.0 does not work"),
        (["--request_seconds", "nan"], "--request_seconds nan does not work"),
        (["--context", "1"], "context = 1 does not work"),
        (["--tensor", "3"], "--tensor 3 does not fit"),
        (["--checkpoint", "7"], "has no checkpoint of step 7"),
        (["--chat_template", "/nothing"], "--chat_template /nothing cannot be read"),
        (["--token", "abc"], "does not know --token → did you mean --token_file?"),
        (["--prot", "1"], "did you mean --port?"),
    ],
)
def test_refusals(small, words, says):
    with pytest.raises(Mistake) as mistake:
        prepare(small, *words)
    assert says in str(mistake.value) and "→" in str(mistake.value)


def test_a_port_that_is_taken(small):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(Mistake, match="cannot be used .* → another --port"):
        prepare(small, "--port", str(other.getsockname()[1]))


def test_defaults(small):
    task = prepare(small)
    assert task.context == 128 and task.token is None and task.limits.queue == 64
    assert prepare(small, "--context", "500", "--queue", "3").limits.queue == 3


def test_a_missing_package_is_named_with_the_pip_line(small, monkeypatch):
    monkeypatch.setattr(task_file, "PACKAGES", {"no_such_package": "no-such-package"})
    with pytest.raises(Mistake, match="serve needs no-such-package → pip install -r requirements-serve.txt"):
        prepare(small)


def test_help_and_refusals_need_no_torch():
    code = "import sys; import research.serve; sys.exit('torch' in sys.modules and 'torch was imported')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_cache_is_as_large_as_said(small):
    from parallel.grid import Grid
    from research.restore import Plan, decoder_of

    task = prepare(small, "--slots", "3")
    decoder = decoder_of(Plan(small.path, task.checkpoint, slots=3, context=128), Grid())
    assert cache_bytes(task.experiment.model, 3, 128, 1, 4) == sum(core.keys.nbytes + core.values.nbytes for core in decoder.cores)
