"""`python -m research`: its help, the exit codes, and errors in one line."""

import subprocess
import sys

import pytest

from parallel.errors import Mistake
from research import ROOT
from research import __main__ as dispatcher
from research.cli import runs
from research.cli.verbs import VERBS, suggestion


def research(*argv, **more):
    return subprocess.run([sys.executable, "-m", "research", *argv], capture_output=True, text=True, cwd=ROOT, timeout=60, **more)


def test_help_names_every_verb_and_the_way_to_train():
    finished = research("--help")
    assert finished.returncode == 0 and finished.stderr == ""
    assert all(f"  {verb} " in finished.stdout for verb in VERBS) and "deepspeed experiments/" in finished.stdout
    bare = research()
    assert (bare.returncode, bare.stdout) == (2, finished.stdout)


def test_every_verb_is_a_file():
    for verb in VERBS:
        assert (ROOT / "research" / "cli" / f"{dispatcher.file_of(verb)}.py").is_file(), verb


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnus"], "error  python -m research does not know rnus → did you mean runs?"),
        (["xyz"], "error  python -m research does not know xyz → use prepare, runs, generate, "),
        (["__main__"], "error  python -m research does not know __main__"),
        (["runs", "--jsno"], "error  python -m research runs does not know --jsno → did you mean --json?"),
        (["runs", "--root"], "error  python -m research runs: argument --root: expected one argument"),
        (["runs", "extra"], "error  python -m research runs does not know extra"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message):
    finished = research(*argv)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith(message) and finished.stderr.count("\n") == 1


def test_no_verb_is_imported_before_it_is_asked_for():
    heavy = ("torch", "wandb", "rich", "pydantic")
    code = f"import sys, research.__main__ as m; m.main(['--help']); print([x for x in {heavy} if x in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert finished.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    shell = f"{sys.executable} -m research runs --root {tmp_path} | true; echo ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (finished.stdout, finished.stderr) == ("0\n", "")


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def raising(error):
        def main(argv):
            raise error

        return main

    monkeypatch.setattr(runs, "main", raising(KeyboardInterrupt()))
    assert dispatcher.main(["runs"]) == 130
    monkeypatch.setattr(runs, "main", raising(Mistake("a → b")))
    assert dispatcher.main(["runs"]) == 2 and capsys.readouterr().err == "error  a → b\n"
    monkeypatch.setattr(runs, "main", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        dispatcher.main(["runs"])


def test_nearest_word():
    assert suggestion("genrate", VERBS) == " → did you mean generate?"
    assert suggestion("plan", VERBS) == suggestion("--version", VERBS) == f" → use {', '.join(VERBS)}"
