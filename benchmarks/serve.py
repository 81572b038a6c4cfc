"""What serving many at once is worth: tokens a second of `python -m research serve` with 1, 8 and 32 clients, as a ratio to one.

    python benchmarks/serve.py RUN [--clients 1 8 32] [--tokens 64] [--repetitions 5] [options of serve]

Starts a server of its own with as many slots as the most clients, and with all options that are not this program's. Each client
sends one completion at a time, greedy, and the next until it has been answered `--rounds` times; tokens are those that the server
counts in `usage`. The numbers of clients take turns, so that a machine whose speed drifts slows all of them. All answers must be the
same text. `first piece` is the median wait for the first piece of a stream while all clients write, one newcomer at a time.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx

from research import ROOT
from research.cli.verbs import count
from research.cluster.exit_codes import refusing

PROMPT = "The meaning of life is"


def started(run: str, slots: int, more: list[str]) -> tuple[subprocess.Popen, str]:
    """(the server's process, its address)."""
    command = [sys.executable, "-m", "research", "serve", run, "--port", "0", "--slots", str(slots), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while line := process.stdout.readline():
        print(line, end="")
        if line.startswith("address"):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # its log, or the pipe would be full one day
            return process, line.split()[1]
    raise SystemExit("the server did not begin")


async def speed(url: str, clients: int, tokens: int, rounds: int) -> tuple[float, set[str]]:
    """Tokens a second of so many clients, and the texts that they got."""
    asked = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    counts, texts = [], set()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

        async def client() -> None:
            for _ in range(rounds):
                answer = (await http.post("/v1/completions", json=asked)).json()
                counts.append(answer["usage"]["completion_tokens"])
                texts.add(answer["choices"][0]["text"])

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return sum(counts) / (time.perf_counter() - begun), texts


async def first(url: str, clients: int, tokens: int) -> float:
    """Seconds until a newcomer's first piece, beside so many less one."""
    asked = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        others = [asyncio.create_task(http.post("/v1/completions", json=asked | {"stream": False})) for _ in range(clients - 1)]
        await asyncio.sleep(0.5 if others else 0)
        begun = time.perf_counter()
        async with http.stream("POST", "/v1/completions", json=asked | {"max_tokens": 4}) as response:
            async for _ in response.aiter_lines():
                waited = time.perf_counter() - begun
                break
        await asyncio.gather(*others)
        return waited


def main() -> None:
    """Parses the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--clients", type=count, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=count, default=64, help="of each answer")
    parser.add_argument("--rounds", type=count, default=1, help="answers for each client")
    parser.add_argument("--repetitions", type=count, default=5)
    arguments, of_serve = parser.parse_known_args()
    process, url = started(arguments.run, max(arguments.clients), of_serve)
    try:
        measure(arguments, url)
    finally:
        process.terminate()
        process.wait()


def measure(arguments: argparse.Namespace, url: str) -> None:
    """All numbers of clients in turn, then the table."""
    while True:
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    texts: set[str] = set()
    rows: list[list[float]] = []
    for repetition in range(arguments.repetitions + 1):  # the first one warms up
        row = []
        for clients in arguments.clients:
            found, said = asyncio.run(speed(url, clients, arguments.tokens, arguments.rounds))
            row.append(found)
            texts |= said
        rows += [row] if repetition else []
    if len(texts) != 1:
        raise SystemExit(f"the same request had {len(texts)} texts")
    print("clients   tokens/s   ratio  (range of the pairs)   first piece, s")
    for i, clients in enumerate(arguments.clients):
        ratios = sorted(row[i] / row[0] for row in rows)
        waits = statistics.median(asyncio.run(first(url, clients, arguments.tokens)) for _ in range(3))
        middle = f"{statistics.median(row[i] for row in rows):10.1f} {statistics.median(ratios):7.2f}"
        print(f"{clients:7} {middle}  ({ratios[0]:.2f} – {ratios[-1]:.2f}) {waits:18.2f}")


if __name__ == "__main__":
    with refusing():
        main()
