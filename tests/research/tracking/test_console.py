"""Terminal output: every number and line to the character, the same in a pipe and on a screen."""

import io
import math
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.table import Table
from rich.text import Text

from research import ROOT
from research.tracking import console as console_module
from research.tracking import format as fmt
from research.tracking.console import Console, show_tables

TRAIN = {
    "progress/step": 50,
    "progress/tokens": 102_400,
    "train/loss": 6.6041,
    "train/ppl": 738.1,
    "train/lr": 3e-3,
    "train/grad_norm": 0.8404,
    "perf/tokens_per_second": 3502.4,
    "perf/memory_mb": 1410.2,
    "mem/host_added_peak_mb": 96.4,
}
VALIDATION = {"progress/tokens": 614_400, "val/loss": 6.102, "val/ppl": 446.4, "val/bits_per_byte": 2.0214}

NUMBERS = [
    (fmt.count, [(0, "0"), (999, "999"), (1000, "1.00 k"), (2048, "2.05 k"), (9_994, "9.99 k"), (9_995, "10 k"), (20_480, "20 k")]),
    (fmt.count, [(102_400, "102 k"), (999_499, "999 k"), (999_500, "1.00 M"), (2_100_000, "2.10 M"), (12_345_678, "12.3 M")]),
    (fmt.count, [(999_499_999, "999 M"), (999_500_000, "1.00 B"), (3e11, "300 B"), (1.5e13, "15.0 T"), (5e15, "5,000 T")]),
    (fmt.loss, [(7.5119, "7.512"), (0.0, "0.000"), (None, "–"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]),
    (fmt.perplexity, [(1829.7, "1830"), (738.2, "738"), (62.14, "62.1"), (9.873, "9.87"), (999_999, "999999"), (1.2e7, "1.2e+07")]),
    (fmt.rate, [(3e-3, "3.0e-03"), (0.0, "0.0e+00"), (1.26e-4, "1.3e-04")]),
    (fmt.norm, [(1.214, "1.21"), (0.0, "0.00"), (0.01, "0.01"), (0.004, "4e-03"), (43.21, "43.2"), (512.4, "512"), (1.2e5, "1e+05")]),
    (fmt.speed, [(3410.4, "3,410"), (87.0, "87"), (1_234_567, "1.23 M"), (None, "–")]),
    (fmt.memory, [(410.2, "410 MB"), (9_800, "9,800 MB"), (12_300, "12.3 GB"), (78_123, "78.1 GB"), (None, "–")]),
    (fmt.duration, [(0, "0:00"), (6.6, "0:07"), (171, "2:51"), (59.6, "1:00"), (3599.6, "1:00:00"), (3771, "1:02:51")]),
    (fmt.duration, [(86_399, "23:59:59"), (86_400, "1d 00:00"), (274_000, "3d 04:06"), (-3, "0:00"), (None, "–"), (math.inf, "inf")]),
]


@pytest.mark.parametrize(("function", "number", "said"), [(f, *case) for f, cases in NUMBERS for case in cases])
def test_a_number_as_a_person_reads_it(function, number, said):
    assert function(number) == said


def test_text_of_a_model_cannot_steer_the_terminal():
    assert fmt.one_line("a\n b\t\x1b[31mc\x07\u202e é▸") == r"a b \x1b[31mc\x07\u202e é▸"


def test_the_table_is_aligned_to_the_character():
    first = TRAIN | {"progress/step": 10, "progress/tokens": 20_480, "train/loss": 7.512, "train/ppl": 1829.7, "train/lr": 1e-3}

    def table(console):
        console.columns()
        console.train(first | {"train/grad_norm": 1.21, "perf/tokens_per_second": 3410}, 171)
        console.train(TRAIN, 146)
        console.validation(VALIDATION, False, "step_000300 (0.2 s)")
        console.validation(VALIDATION, True, None)

    lines = said(table).splitlines()
    assert lines == [
        "",
        " step   tokens   loss     ppl       lr   |g|  tokens/s   memory    added    eta",
        "   10     20 k  7.512    1830  1.0e-03  1.21     3,410 1,410 MB    96 MB   2:51",
        "   50    102 k  6.604     738  3.0e-03  0.84     3,502 1,410 MB    96 MB   2:26",
        "  val    614 k  6.102     446  2.021 bits/byte         saved step_000300 (0.2 s)",
        "  val    614 k  6.102     446  2.021 bits/byte ↓ best",
    ]
    assert max(map(len, lines)) <= 80


def test_wide_and_wild_values_stay_apart():
    wild = dict.fromkeys(TRAIN, math.nan) | {"progress/step": 1_000_000, "progress/tokens": 2.048e9, "perf/tokens_per_second": 3.5e6}
    line = said(lambda console: console.train(wild | {"perf/memory_mb": 78_000, "mem/host_added_peak_mb": 12_300}, 3e6))
    assert line.split() == ["1000000", "2.05", "B", "nan", "nan", "nan", "nan", "3.50", "M", "78.0", "GB", "12.3", "GB", "34d", "17:20"]
    bare = said(lambda console: console.train({"progress/step": 1, "progress/tokens": 8}, None))
    assert bare.split() == ["1", "8", *"––––––––"]


DONE = [
    ((300, 300, 177, (2.021, 300), 0, "loss.png"), "done   300 steps in 2:57 · best 2.021 bits/byte at step 300 · 0 skipped · loss.png"),
    (
        (300, 300, 177, None, 0, "loss.png", {"perf/memory_mb": 1410.2, "mem/host_added_peak_mb": 96.4}),
        "done   300 steps in 2:57 · 0 skipped · 1,410 MB of memory, 96 MB added by the run · loss.png",
    ),
    ((120, 300, 70, None, 2, None), "ended  after 120 of 300 steps, 1:10 · 2 skipped"),
    ((1, 1, 0.4, None, 0, None), "done   1 step in 0:00 · 0 skipped"),
]


@pytest.mark.parametrize(("arguments", "line"), DONE)
def test_the_end_says_what_was_reached(arguments, line):
    assert said(lambda r: r.done(*arguments)) == line + "\n"


def said(call, **terminal):
    stream = io.StringIO()
    call(Console(stream, **terminal))
    return stream.getvalue()


def everything(r):
    r.header([("", "gpt · run gpt-7f3a2c"), ("config", "long " * 40 + "[bold]:smile:"), ("tracking", "W&B offline")])
    with r.progress("tokenizing", 3) as advance:
        advance(3)
    with r.progress("waiting") as advance:
        advance(1)
    r.columns()
    r.train(TRAIN, 1.0)
    r.validation(VALIDATION, True, "step_000300 (0.2 s)")
    r.done(*DONE[0][0])
    r.sample("My fellow\ncitizens", "of the United States " * 9)
    r.next(["python -m research generate runs/gpt_sotu/latest --prompt 'My fellow citizens' --and more", "second"])
    r.warn("careful\nnow")
    figures = [("agreement", "accuracy", 0.61234), ("perplexity:a\nb.txt", "loss", math.nan), ("w", "word_perplexity", 812.3)]
    r.evaluation(VALIDATION, figures)


def test_a_pipe_gets_one_line_a_thing_and_no_escape():
    lines = said(everything).split("\n")
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)
    assert lines[0] == "gpt · run gpt-7f3a2c" and lines[1] == "config   " + "long " * 40 + "[bold]:smile:"
    assert lines[2:6] == ["tracking W&B offline", "tokenizing …", "waiting …", ""]
    assert lines[9] == DONE[0][1]
    assert lines[10] == "sample My fellow citizens ▸ " + " ".join(["of the United States"] * 9)
    assert lines[11:13] == [
        "next   python -m research generate runs/gpt_sotu/latest --prompt 'My fellow citizens' --and more",
        "       second",
    ]
    assert lines[13] == "warn   careful now"
    tokens = lines[8][:14].removeprefix("  val")
    assert lines[14:] == [f" eval{tokens}  agreement accuracy 0.612 · perplexity:a b.txt loss nan · w word_perplexity 812", ""]


def test_long_work_says_in_a_pipe_how_far_it_is(monkeypatch):
    """A line every PIPE_SECONDS while the work is not done, also if nothing tells how far it is; none after it."""
    monkeypatch.setattr(console_module, "PIPE_SECONDS", 0.01)

    def lines(act, amount, *arguments, **settings):
        """What is told, at least until a line has the amount: on a busy machine a line may come before the work has advanced."""
        stream = io.StringIO()
        with Console(stream).progress(*arguments, **settings) as advance:
            act(advance)
            deadline = time.monotonic() + 60
            while amount not in stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.005)
        told = stream.getvalue()
        time.sleep(0.03)
        assert stream.getvalue() == told
        return told.splitlines()

    told = lines(lambda advance: advance(1200), "1,200", "validation", 2000)
    assert (told[0], told[-1]) == ("validation …", "validation … 1,200 of 2,000 · 0:00")
    told = lines(lambda advance: advance(41_000_000), "41.0", "tokenizing a", unit="characters")
    assert told[-1] == "tokenizing a … 41.0 M characters · 0:00"
    assert lines(lambda advance: None, "0:00", "saving", announced=False)[0] == "saving … 0:00"
    pattern = r"reading … 1\.20 k of 2\.00 k bytes · [\d.,]+( [kMBT])?/s · 0:00, 0:00 left"
    assert re.fullmatch(pattern, lines(lambda advance: advance(1200), "1.20 k", "reading", 2000, "bytes")[-1])


def test_a_bar_shows_amount_and_rate_of_what_is_counted():
    def act(console):
        with console.progress("reading", 2000, "bytes") as advance:
            advance(500)
            time.sleep(0.05)
            advance(700)

    assert re.search(r"1\.20 k of 2\.00 k bytes · [\d.,]+( [kMBT])?/s", said(act, terminal=True))


def test_short_work_that_is_not_announced_leaves_no_line():
    assert said(lambda console: console.progress("saving", announced=False).__enter__()(1)) == ""


PROGRAM = "from tests.research.tracking.test_console import Console, everything; everything(Console())"


def on_a_screen(columns):
    """What a real terminal of this width receives."""
    ours, theirs = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40", "LANG": "C.UTF-8"}
    running = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:  # Linux says EIO once the other end has closed
        pass
    assert running.wait(60) == 0
    return b"".join(chunks).decode()


def test_a_screen_gets_colour_and_hanging_lines():
    seen = on_a_screen(80)
    assert "\x1b[1mgpt · run gpt-7f3a2c" in seen and "\x1b[1;32m  val" in seen and "\x1b[36mconfig   \x1b[0mlong" in seen
    assert "\r\n\x1b[36m         \x1b[0mlong long" in seen  # long text goes on under itself
    assert "\x1b[36mnext   \x1b[0mpython -m research generate runs/gpt_sotu/latest --prompt 'My fellow citizens' --and more" in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") >= 1  # the bar gave the cursor back


def test_a_failure_inside_progress_is_the_callers():
    for terminal in (True, False):
        with pytest.raises(ZeroDivisionError), Console(io.StringIO(), terminal=terminal).progress("a", 2):
            raise ZeroDivisionError


def test_an_old_encoding_costs_a_letter_not_the_run():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(stream).sample("é", "x")
    assert stream.buffer.getvalue() == "sample é > x\n".encode("latin-1")


def test_a_quiet_console_says_nothing(capsys):
    everything(Console(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_what_is_needed_first_comes_before_what_is_next():
    assert said(lambda r: r.next(["a b", "c"], first="source x")).split("\n")[:3] == ["first  source x", "next   a b", "       c"]
    assert said(lambda r: r.next(["a b"])).split("\n")[0] == "next   a b"


def test_a_cell_of_a_table_steers_no_terminal(capsys):
    """A host's name, as another machine gives it: a colour and a carriage return pass the streams' escaping, and so are escaped before."""
    table = Table("host", "clock", box=None)
    table.add_row("node1\x1b[31m\rnode2", Text("ahead\x1b[1mnode3", "bold"))
    show_tables([table])
    shown = capsys.readouterr().out
    assert "node1\\x1b[31m node2" in shown and "ahead\\x1b[1mnode3" in shown and not {"\x1b", "\r"} & set(shown)
