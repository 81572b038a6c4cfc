"""What hostile clients cost the others: the slowest answer to fuzzed bodies, completions beside chat templates that do not end, memory.

    python benchmarks/serve_hostile.py RUN [--bodies 5000] [--chats 12] [--requests 2000] [--seed N] [options of serve]

Starts a server of its own whose chat template loops without end for a message that says so. Four measurements, one after the other:

    alone       completions and /health on a server that has nothing else to do, for comparison
    bodies      fuzzed bodies of up to --body_bytes, one after the other, and beside them /health, which must not wait for any
    templates   completions beside --chats conversations that do not end
    memory      the server's resident memory after the first tenth of --requests, and after all of them

Every answer must be one that docs/serving.md describes. Seconds depend on the machine and on what else runs on it; the ratios to
"alone" less so. The seed is printed: with it, the bodies are the same.
"""

import argparse
import collections
import contextlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx

from parallel.errors import Mistake
from research import ROOT
from research.cli.verbs import count
from research.cluster.exit_codes import refusing

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
DOCUMENTED = {200, 400, 404, 408, 413, 415, 429}
"""The statuses that a body may have. A 5xx would be an error of the server."""
ENDLESS = "without end"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}\n{% if '" + ENDLESS + "' in message.content %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)
ASKED = {"prompt": "The meaning of life is", "max_tokens": 8, "temperature": 0}
UNITS = [
    '"', '\\"', "\\\\", "\\", "[", "{", "[]", "{}", "[],", "{},", '"a",', "1,", "1e308,", "7", "-", ".5e", " ", "\n", "\0", "\\u0000",
    "\\ud800", "a", "etaoin shrdlu ", "漢", "½", "'", "<|", "<|im_end|>", '"k":1,', '{"k":', "null,", "NaN,", "true", "}", "]", ":", ",",
]  # fmt: skip
"""What a flood consists of, again and again."""


def fuzzed(chance: random.Random, largest: int) -> tuple[str, bytes]:
    """(address, body): a flood of one to three units alone or inside of a request, or a request with random bytes changed.

    Sizes are drawn evenly over their logarithms up to `largest` bytes; one in a hundred is larger.
    """
    path = chance.choice([COMPLETIONS, CHAT])
    size = int(2 ** chance.uniform(0, largest.bit_length() - 1))
    size = 2 * largest if chance.random() < 0.01 else size
    unit = "".join(chance.choices(UNITS, k=chance.randint(1, 3)))
    flood = (unit * (size // len(unit.encode()) + 1)).encode()
    request: dict = {"max_tokens": 2, "truncation": chance.choice(["auto", "disabled"])}
    request |= {"prompt": "MARK"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "MARK"}]}
    place = chance.choice(["alone", "text", "text", "list", "texts", "x", "name", "stop", "metadata", "changed"])
    if place == "alone":
        return path, flood[:size]
    if place == "changed":
        body = bytearray(json.dumps(request | {"user": "x" * min(size, 4096), "stop": ["a"], "seed": 1}).encode())
        for _ in range(chance.randint(1, 8)):
            start = chance.randrange(len(body))
            body[start : start + chance.choice([0, 1, 1, 1, 9])] = chance.choice([b"", chance.randbytes(1), body[start : start + 40]])
        return path, bytes(body)
    if place == "text":
        return path, json.dumps(request).encode().replace(b"MARK", flood[:size])
    if place == "texts":  # a valid text whatever the unit is
        text = json.dumps((unit * (size // len(unit) + 1))[:size], ensure_ascii=chance.random() < 0.5).encode()
        return path, json.dumps(request).encode().replace(b'"MARK"', text)
    if place == "list":
        return path, json.dumps(request).encode().replace(b'"MARK"', b"[" + flood[:size] + b"1]")
    if place == "name":
        return path, json.dumps(request | {"HERE": 1}).encode().replace(b"HERE", flood[:size])
    return path, json.dumps(request | {place: "HERE"}).encode().replace(b'"HERE"', flood[:size])


def check_answer(answer: httpx.Response) -> None:
    """Raises a ValueError unless the answer is of a kind that is documented."""
    if answer.status_code not in DOCUMENTED:
        raise ValueError(f"status {answer.status_code}: {answer.text[:200]}")
    body = answer.json()
    if answer.status_code == 200 and "choices" not in body:
        raise ValueError(f"no choices: {answer.text[:200]}")
    if answer.status_code != 200 and not ({"message", "type", "param", "code"} == set(body["error"]) and "→" in body["error"]["message"]):
        raise ValueError(f"an error without a way out: {answer.text[:200]}")


@contextlib.contextmanager
def started(run: str, more: list[str]) -> Iterator[tuple[subprocess.Popen, str]]:
    """(the server's process, its address). Its chat template is TEMPLATE."""
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        command = [sys.executable, "-m", "research", "serve", run, "--port", "0", "--chat_template", template.name, *more]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            lines = itertools.takewhile(bool, iter(process.stdout.readline, ""))
            address = next((line.split()[1] for line in lines if line.startswith("address")), None)
            if address is None:
                raise Mistake("the server did not begin → see its error above")
            threading.Thread(target=process.stdout.read, daemon=True).start()  # its log, or the pipe would be full one day
            yield process, address
        finally:
            process.terminate()
            process.wait()


def timed(call: Callable[[], httpx.Response]) -> tuple[float, httpx.Response]:
    """(seconds, answer)."""
    begun = time.perf_counter()
    answer = call()
    return time.perf_counter() - begun, answer


class Beside:
    """Calls a function again and again in a thread and keeps the seconds of each call. Use it in a `with` statement."""

    def __init__(self, call: Callable[[], httpx.Response], pause: float) -> None:
        self.call, self.pause, self.seconds = call, pause, list[float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat)

    def _repeat(self) -> None:
        while not self._ended.wait(self.pause):
            seconds, answer = timed(self.call)
            answer.raise_for_status()
            self.seconds.append(seconds)

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def resident(http: httpx.Client) -> float:
    """The server's resident memory in megabytes, as it says itself."""
    found = re.search(r"^process_resident_memory_bytes (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1]) / 1e6


def of_bodies(http: httpx.Client, url: str, chance: random.Random, number: int, largest: int) -> None:
    """Sends fuzzed bodies and prints the slowest answers."""
    rows: list[tuple[float, int, int, bytes]] = []
    statuses: collections.Counter[int] = collections.Counter()
    with httpx.Client(base_url=url, timeout=600) as other, Beside(lambda: other.get("/health"), 0.02) as health:
        for _ in range(number):
            path, body = fuzzed(chance, largest)
            seconds, answer = timed(lambda path=path, body=body: http.post(path, content=body, headers=JSON))  # type: ignore[misc]
            try:
                check_answer(answer)
            except ValueError as error:
                raise Mistake(f"{path} {body[:80]!r}… of {len(body)} bytes: {error} → mend the server") from None
            rows.append((seconds, len(body), answer.status_code, body[:60]))
            statuses[answer.status_code] += 1
    rows.sort(reverse=True)
    print(f"bodies      {number}: {', '.join(f'{n} × {status}' for status, n in sorted(statuses.items()))}")
    print(f"            slowest {rows[0][0]:.3f} s · median {statistics.median(row[0] for row in rows):.4f} s")
    for seconds, size, status, beginning in rows[:3]:
        print(f"            {seconds:.3f} s  {size:8} bytes  {status}  {beginning!r}")
    long = [(seconds / size, size) for seconds, size, *_ in rows if size >= 2**14]
    if long:
        print(f"            most time per byte, of those of 16 KiB and more: {1e6 * max(long)[0]:.2f} µs ({max(long)[1]} bytes)")
    print(f"            /health beside them: slowest {max(health.seconds):.3f} s of {len(health.seconds)}")


def of_templates(http: httpx.Client, url: str, chats: int, alone: list[float]) -> None:
    """Completions beside conversations whose template does not end."""
    statuses: collections.Counter[int] = collections.Counter()

    def chat() -> None:
        messages = [{"role": "user", "content": ENDLESS}]
        statuses[httpx.post(f"{url}{CHAT}", json={"messages": messages, "max_tokens": 2}, timeout=600).status_code] += 1

    threads = [threading.Thread(target=chat) for _ in range(chats)]
    for thread in threads:
        thread.start()
    seconds = []
    while any(thread.is_alive() for thread in threads):
        taken, answer = timed(lambda: http.post(COMPLETIONS, json=ASKED))
        answer.raise_for_status()
        seconds.append(taken)
    for thread in threads:
        thread.join()
    print(f"templates   {chats} chats without end: {', '.join(f'{n} × {status}' for status, n in sorted(statuses.items()))}")
    slowest, median = max(seconds) / max(alone), statistics.median(seconds) / statistics.median(alone)
    print(f"            {len(seconds)} completions beside them: slowest {max(seconds):.3f} s ({slowest:.2f} of alone), median {median:.2f}")


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--bodies", type=count, default=5000)
    parser.add_argument("--chats", type=count, default=12)
    parser.add_argument("--requests", type=count, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="of the bodies (default: another one each time)")
    arguments, of_serve = parser.parse_known_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed        {seed}")
    with started(arguments.run, of_serve) as (process, url), httpx.Client(base_url=url, timeout=600) as http:
        for _ in range(5):
            http.post(COMPLETIONS, json=ASKED).raise_for_status()
        alone = [timed(lambda: http.post(COMPLETIONS, json=ASKED))[0] for _ in range(100)]
        health = [timed(lambda: http.get("/health"))[0] for _ in range(100)]
        print(f"alone       completions: slowest {max(alone):.3f} s, median {statistics.median(alone):.4f} s · /health {max(health):.3f} s")
        of_bodies(http, url, random.Random(seed), arguments.bodies, 2**20)
        of_templates(http, url, arguments.chats, alone)
        early = 0.0
        for i in range(arguments.requests):
            http.post(COMPLETIONS, json=ASKED).raise_for_status()
            early = resident(http) if i == arguments.requests // 10 else early
        print(f"memory      {early:.0f} MB after {arguments.requests // 10} requests, {resident(http):.0f} MB after {arguments.requests}")
        if process.poll() is not None:
            raise Mistake(f"the server has ended with code {process.returncode} → mend it")


if __name__ == "__main__":
    with refusing():
        main()
