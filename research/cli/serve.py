"""The command line of `serve`, and everything that can be refused before torch is imported."""
# MERGED-DOC """`python -m research serve RUN`: a trained model answers over HTTP, many clients at once."""

import argparse
import contextlib
import importlib.util
import signal
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import GPT
from parallel.errors import Mistake
from research import ROOT
from research.cli.trained_run import Trained, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import LONGEST_TEMPLATE, TEMPLATE
from research.generation.settings import refuse_context
from research.serving.limits import Limits
from research.tracking.format import compact, memory

if TYPE_CHECKING:
    from research.serving.server import Running, ServerSpec

USUAL_PORT, USUAL_SLOTS, USUAL_CONTEXT = 8000, 8, 4096
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "jinja2": "jinja2"}
"""What is imported -> what pip calls it."""
WHAT = """Lets a trained model answer over HTTP, as OpenAI's servers do: /v1/completions, /v1/chat/completions (both stream), /v1/models,
/health, /metrics for Prometheus, and a chat page at /. Requests of all clients are written side by side, each in a slot of the cache;
who finds no slot waits in a queue. Listens on this machine only, unless a token is set. Ctrl-C ends it. docs/serving.md says more."""


@dataclass(frozen=True)
class Task(Trained):
    """A command that can be carried out."""

    tokenizer: Tokenizer
    limits: Limits
    token: str | None
    template: str | None
    """The text of --chat_template."""
    listener: socket.socket
    """Bound, and not listening yet: a port that is taken is refused before a model is read."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its text may have together."""
        return min(self.experiment.model.seq_length, USUAL_CONTEXT) if self.arguments.context is None else self.arguments.context

    def spec(self) -> "ServerSpec":
        """The command as the server takes it."""
        from research.serving.server import ServerSpec

        arguments = self.arguments
        return ServerSpec(
            title=self.folder.title,
            folder=self.folder.path,
            checkpoint=self.checkpoint,
            model=self.experiment.model,
            tokenizer=self.tokenizer,
            precision=arguments.precision,
            tensor=arguments.tensor,
            slots=arguments.slots,
            context=self.context,
            limits=self.limits,
            token=self.token,
            template=self.template,
            template_name=arguments.chat_template.name if self.template else TEMPLATE,
            listener=self.listener,
        )

    @property
    def address(self) -> str:
        """Where to reach it."""
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def parser() -> Parser:
    """All options, with words that teach."""
    found = Parser("serve", WHAT)
    found.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    found.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    found.add_argument("--chat_template", type=Path, metavar="FILE", help="a jinja template (default: the one beside the run's tokenizer)")
    net = found.add_argument_group("who may ask")
    net.add_argument("--port", type=int, default=USUAL_PORT, help=f"0: any that is free (default: {USUAL_PORT})")
    net.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every address of this machine; needs --token_file (default: 127.0.0.1)")
    what = "a file with the word that clients must send (api_key); a file, because others can read a command line"
    net.add_argument("--token_file", type=Path, metavar="FILE", help=what)
    machine = found.add_argument_group("how it is computed")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    machine.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    what = f"texts that are written at once (default: {USUAL_SLOTS})"
    machine.add_argument("--slots", type=int, default=USUAL_SLOTS, metavar="N", help=what)
    what = f"room for prompt and text together, in tokens (default: model.seq_length, {USUAL_CONTEXT} at most)"
    machine.add_argument("--context", type=int, metavar="N", help=what)
    bounds = found.add_argument_group("bounds; what is over one is refused")
    for each in fields(Limits):
        usual = each.default
        what = f"{each.metadata['what']} (default: {usual:,})"
        bounds.add_argument(f"--{each.name}", type=type(usual), default=usual, metavar="N", help=what)
    return found


def prepared(arguments: argparse.Namespace) -> Task:
    """The command, checked; its port is taken."""
    refuse_missing()
    refuse_launcher("serve")
    if arguments.slots < 1:
        raise Mistake(f"--slots {arguments.slots} does not work → use 1 or more")
    limits = Limits(**{each.name: getattr(arguments, each.name) for each in fields(Limits)})
    token = _token(arguments)
    found = find(arguments)
    template = _template(arguments.chat_template)
    if arguments.context is not None:
        refuse_context(arguments.context, found.experiment.model)
    tokenizer = load_tokenizer(found.experiment.data, ROOT, say)
    return Task(**vars(found), tokenizer=tokenizer, limits=limits, token=token, template=template, listener=_bound(arguments))


def refuse_missing() -> None:
    """A Mistake where a package is not installed."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Mistake(f"serve needs {' and '.join(missing)} → pip install -r requirements-serve.txt")


def cache_bytes(model: GPT, slots: int, context: int, tensor: int, each: int) -> int:
    """Memory of the cache on one rank, where a number has `each` bytes."""
    heads = max(model.num_kv_heads // tensor, 1)
    return 2 * model.num_layers * slots * heads * context * model.head_size * each


def _token(arguments: argparse.Namespace) -> str | None:
    from research.serving import access

    if arguments.token_file is not None:
        return access.read_token(arguments.token_file)
    if not access.is_loopback(arguments.host):
        said = f"--host {arguments.host} lets other machines in, and there is no token"
        raise Mistake(f"{said} → add --token_file TOKEN, made with {access.MAKE}")
    return None


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"--chat_template {path} cannot be read ({error}) → name a file of jinja text") from None
    if not 0 < len(text) <= LONGEST_TEMPLATE:
        raise Mistake(f"--chat_template {path} is empty, or longer than {LONGEST_TEMPLATE} characters → name a file of jinja text")
    return text


def _bound(arguments: argparse.Namespace) -> socket.socket:
    """A socket at the address. It does not listen: who comes before the model is there is told so by the system."""
    host, port = arguments.host.strip("[]"), arguments.port
    if not 0 <= port < 2**16:
        raise Mistake(f"--port {port} does not work → use 1 to 65535, 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise Mistake(f"--host {host} --port {port} cannot be used ({error.strerror}) → another --port, 0 for any that is free") from None
    return found


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    task = prepared(parser().parse_args(argv))
    _refuse_memory(task)  # torch begins here
    from research.serving.server import ready

    with ready(task.spec(), _say) as running:
        for number in SIGNALS:
            signal.signal(number, lambda *_: running.stop())
        _announce(task, running)
        running.run()
    _say("stopped")


def _refuse_memory(task: Task) -> None:
    """A Mistake where the cache is larger than this machine's memory. On a GPU torch says it."""
    import psutil
    import torch

    slots, total = task.arguments.slots, psutil.virtual_memory().total
    needed = cache_bytes(task.experiment.model, slots, task.context, 1, 4)
    if not torch.cuda.is_available() and needed > total:
        size = f"a cache of {slots} slots × {task.context} tokens needs {memory(needed / 1e6)}"
        raise Mistake(f"{size}, this machine has {memory(total / 1e6)} → fewer --slots, or less --context")


def _announce(task: Task, running: "Running") -> None:
    from models.estimates.parameters import parameters
    from models.inference.decoder import Decoder

    service, decoder = running.service, running.engine.writer.decoder
    assert isinstance(decoder, Decoder)
    kept = sum(core.keys.nbytes + core.values.nbytes for core in decoder.cores)
    each = f" on each of {task.arguments.tensor} tensor ranks" if task.arguments.tensor > 1 else ""
    size = compact(parameters(task.experiment.model) or 0)
    closed = "with the token" if task.token else "this machine only"
    bearer = f' -H "Authorization: Bearer $(cat {task.arguments.token_file})"' if task.token else ""
    example = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
    _say(f"serve    {service.name} · step {service.step} · {size} parameters · {service.precision}")
    _say(f"cache    {service.slots} slots × {service.context} tokens · {memory(kept / 1e6)}{each} · {task.limits.queue} more may wait")
    _say(f"chat     template: {service.conversation.name} · a turn ends at {_ends(service)}")
    _say(f"address  {task.address} · {closed} · a page to chat: {task.address}/")
    _say(f"try      curl {task.address}/v1/chat/completions{bearer} -H 'Content-Type: application/json' -d '{example}'")


def _ends(service: Any) -> str:
    tokens = [service.tokenizer.backend.id_to_token(token) for token in service.conversation.ends]
    return " ".join(repr(each) for each in (*tokens, *service.conversation.stops))


def _say(what: str) -> None:
    """A line of the log. Who reads it may leave, or its disk be full: answers go on."""
    with contextlib.suppress(OSError):
        print(what, flush=True)
