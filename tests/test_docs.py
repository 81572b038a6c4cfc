"""Every fenced command and every block of Python in README.md and docs/ is executed, as written, in a copy of the checkout.

The copy's gpt_sotu is small, and trained before a page is read, so that its commands take seconds. A page is one program: its bash blocks
in order, then its Python blocks in one interpreter. A command that cannot run here is in NOT_RUN, with the reason.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research import ROOT
from tests.research.helpers import megatron_files
from tests.research.helpers.hf_models import their_folder

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALL = {
    "num_layers=4": "num_layers=2",
    "hidden_size=192": "hidden_size=48",
    "ffn_size=768": "ffn_size=96",
    "steps=270": "steps=60",
    "batch_size=16, micro_batch_size=8": "batch_size=4, micro_batch_size=2",
    "validate_every=90": "validate_every=30",
    "warmup_steps=30": "warmup_steps=10",
    **{"hidden_size=128": "hidden_size=32", "ffn_size=512": "ffn_size=64", "warmup_steps=50": "warmup_steps=5"},  # code_stdlib
    "steps=1300, batch_size=16, micro_batch_size=8, validate_every=325": "steps=40, batch_size=4, micro_batch_size=2, validate_every=0",
    "steps=600, batch_size=16, micro_batch_size=8, validate_every=100": "steps=10, batch_size=4, micro_batch_size=2, validate_every=5",
    "steps=1500, batch_size=8, micro_batch_size=8, validate_every=500": "steps=10, batch_size=2, micro_batch_size=2, validate_every=5",
}
"""What is smaller in the copy's experiments. The vocabulary and the context stay, because commands name them."""
NOT_RUN = {
    r"make (train|test)\b.*": "sets up a virtual environment; its commands are run by CI",
    r"pip install .*": "the packages are there",
    r"source \.venv/bin/activate.*": "the tests' interpreter is first on the PATH",
    r".*\bwandb login\b.*": "needs an account",
    r"wandb leet .*": "is a program for a terminal, and ends at a key",
}
QUESTION = '{"query": "Is snow warm?", "choices": ["no", "yes"], "gold": 0}\n'
PROBLEM = {
    **{"task_id": "mine/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n"},
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}
FILES = {
    "prompts.jsonl": '{"prompt": "My fellow citizens"}\n{"prompt": "We"}\n',
    "data/wikitext2/test.txt": " = Title = \n \n The cats sleep , and the union of the states is strong . \n",
    "data/lambada/test.jsonl": '{"text": "The state of the union is strong"}\n',
    "my_pairs.jsonl": '{"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}\n',
    "my_questions.jsonl": QUESTION,
    "pairs.jsonl": "".join(json.dumps({"source": f"{n} cats", "target": f"{n} Katzen"}) + "\n" for n in range(500)),
    "chats.jsonl": "".join(json.dumps({"prompt": f"What is {n} and {n}?", "response": f" It is {2 * n}."}) + "\n" for n in range(1000)),
    "my_problems.jsonl": json.dumps(PROBLEM) + "\n",
    "my_tasks/test.jsonl": QUESTION,
    "my_tasks/my_task.yaml": """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: my_tasks/test.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
""",
}
"""Files of the reader's own that pages name."""
SERVERS = re.compile(r"^(python -m research serve .*?)(\s+#.*)?$", re.MULTILINE)
PREAMBLE = r"""
set -euo pipefail
serve_briefly() {  # starts a server, waits until it answers, and ends it by Ctrl-C's signal
    "$@" > server.txt 2>&1 & local server=$!
    for _ in $(seq 240); do grep -q '^address' server.txt && break; kill -0 $server || { cat server.txt; return 1; }; sleep 0.5; done
    grep '^address' server.txt
    test ! -e client.py || python client.py
    kill -INT $server; wait $server
}
"""
LIMIT = 900
"""Seconds for a page."""


def blocks(page: str, language: str) -> list[str]:
    """The contents of the page's fenced blocks of a language."""
    return [body for name, body in FENCE.findall((ROOT / page).read_text("utf-8")) if name == language]


def program(page: str) -> str:
    """The page's commands as one bash script, without those of NOT_RUN."""
    lines = "\n".join(blocks(page, "bash")).split("\n")
    kept = [line for line in lines if not any(re.fullmatch(pattern, line.strip()) for pattern in NOT_RUN)]
    return PREAMBLE + "set -x\n" + SERVERS.sub(r"serve_briefly \1", "\n".join(kept))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with a small gpt_sotu, a trained run of it, and the files that pages take for granted."""
    folder = tmp_path_factory.mktemp("docs") / "tessera"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for config in (folder / "experiments").glob("*/config.py"):
        text = config.read_text("utf-8")
        for old, new in SMALL.items():
            text = text.replace(old, new)
        config.write_text(text, "utf-8")
    for results in (folder / "experiments").glob("*/results"):  # of the large ones, which `check` would say
        shutil.rmtree(results)
    if (ROOT / ".cache").is_dir():  # tokenizers and token stores
        shutil.copytree(ROOT / ".cache", folder / ".cache")
    run(folder, "deepspeed --num_gpus 2 experiments/gpt_sotu/launch.py --parallel.tensor 2 --checkpoints.every 20")
    run(folder, "python experiments/gpt_sotu_dyt/launch.py")
    their_folder(folder / "hf_model", "llama, grouped")
    words = (ROOT / "README.md").read_text("utf-8").split()
    book = "\n".join(" ".join(words[i % 500 :][:40]) for i in range(3000))
    documents = np.random.default_rng(0).integers(0, 50257, (1000, 1, 60))
    megatron_files.write(folder / "corpus_text_document", documents.tolist(), 8, "<u2")
    for name, text in {**FILES, "book.txt": book}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def run(folder: Path, script: str, interpreter: str = "bash") -> str:
    """What the script printed, run in `folder` as a user would: an empty HOME, no W&B key, the tests' interpreter first on the PATH."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    environ = {key: os.environ[key] for key in ("LANG", "TMPDIR") if key in os.environ} | {"OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ |= {"HOME": str(home), "PATH": path, "EDITOR": "true", "PYTHONPATH": str(folder)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    finished = subprocess.run([interpreter, "-c", script], cwd=folder, env=environ, timeout=LIMIT, **output)
    assert finished.returncode == 0, finished.stdout[-4000:]
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_every_command_of_a_page_runs(checkout: Path, page: str) -> None:
    run(checkout, program(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_python_block_of_a_page_runs(checkout: Path, page: str) -> None:
    code = "\n\n".join(blocks(page, "python"))
    if "127.0.0.1" not in code:
        run(checkout, code, sys.executable)
        return
    (checkout / "client.py").write_text(code)  # it asks a server
    try:
        run(checkout, PREAMBLE + "serve_briefly python -m research serve runs/gpt_sotu/latest")
    finally:
        (checkout / "client.py").unlink()


def test_fences_have_a_language_that_says_whether_they_are_run() -> None:
    """bash and python are executed; text is output, or for a cluster; json and toml are data."""
    languages = {name for page in PAGES for name, _ in FENCE.findall((ROOT / page).read_text("utf-8"))}
    assert languages <= {"bash", "python", "text", "json", "yaml"}


def test_what_is_not_run_is_still_there() -> None:
    commands = [line.strip() for page in PAGES for block in blocks(page, "bash") for line in block.split("\n")]
    unused = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, command) for command in commands)]
    assert not unused


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
