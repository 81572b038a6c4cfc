"""`python -m research serve RUN`: an HTTP server for a trained model. The command line is checked before torch is imported."""

import argparse
import contextlib
import importlib.util
import signal
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import GPT
from models.encoder_config import T5
from parallel.errors import Mistake
from parallel.text import printable, read_text
from research import ROOT
from research.cli.trained_run import Trained, add_trust_option, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.cluster.environment import limit_kernel_cache
from research.cluster.memory import limit_heaps
from research.config.abilities import writer_of
from research.data.run_tokenizer import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import LONGEST_TEMPLATE, TEMPLATE
from research.generation.infilling import trained_sentinels
from research.generation.settings import refuse_context
from research.generation.sources import source_form
from research.serving.limits import Limits
from research.serving.prompts import example_prompts
from research.tracking.format import compact, memory

if TYPE_CHECKING:
    from research.serving.server import Running, ServerSpec

DEFAULT_PORT, DEFAULT_SLOTS, DEFAULT_CONTEXT = 8000, 8, 4096
HEAPS, KERNELS = 2, 64
"""What keeps the process's memory bounded whatever clients send: the C library's heaps, and the kernels that oneDNN keeps compiled."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "jinja2": "jinja2"}
"""Import name -> name on PyPI."""
DESCRIPTION = """Serves a trained model over HTTP with OpenAI's interface: /v1/completions, /v1/chat/completions (both can stream),
/v1/models, /health, /metrics for Prometheus, and a chat page at /. The texts of all clients are generated in one batch, each in a slot of
the cache; if no slot is free, a text waits in a queue. The server listens on this machine only, unless a token is set. Ctrl-C stops it. See
docs/serving.md."""


@dataclass(frozen=True)
class Task(Trained):
    """A checked `serve` command."""

    tokenizer: Tokenizer
    limits: Limits
    model: GPT | T5
    token: str | None
    template: str | None
    """The text of --chat_template; None: the one beside the run's tokenizer."""
    listener: socket.socket
    """Bound, and not listening yet: a port that is in use is rejected before the model is loaded."""

    @property
    def context(self) -> int:
        """Number of tokens that a prompt and its text may have together."""
        return min(self.experiment.model.seq_length, DEFAULT_CONTEXT) if self.arguments.context is None else self.arguments.context

    @property
    def address(self) -> str:
        """The server's URL."""
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def spec(self) -> "ServerSpec":
        """What the server needs of the command."""
        from research.serving.server import ServerSpec

        arguments = self.arguments
        return ServerSpec(
            title=self.folder.title,
            folder=self.folder.path,
            checkpoint=self.checkpoint,
            model=self.model,
            source=source_form(self.experiment, self.tokenizer),
            tokenizer=self.tokenizer,
            precision=arguments.precision,
            tensor=arguments.tensor,
            slots=arguments.slots,
            context=self.context,
            limits=self.limits,
            token=self.token,
            template=self.template,
            example_prompts=example_prompts(self.experiment.data.validation, ROOT),
            sentinels=trained_sentinels(self.experiment, self.tokenizer),
            template_name=arguments.chat_template.name if self.template else TEMPLATE,
            listener=self.listener,
        )


def main(argv: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    task = checked_task(parser().parse_args(argv))
    limit_heaps(HEAPS)
    limit_kernel_cache(KERNELS)
    _check_memory(task)  # imports torch
    from research.serving.server import make_server

    with make_server(task.spec(), _log) as running:
        for number in SIGNALS:
            signal.signal(number, lambda *_: running.stop())
        _announce(task, running)
        running.run()
    _log("stopped")


def parser() -> Parser:
    """The command line's options."""
    parser = Parser("serve", DESCRIPTION)
    parser.add_argument("run", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    add_trust_option(parser)
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="a jinja template (default: the one beside the run's tokenizer)")
    network = parser.add_argument_group("network and access")
    network.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0: any free port (default: {DEFAULT_PORT})")
    text = "0.0.0.0: every address of this machine, which needs --token_file (default: 127.0.0.1)"
    network.add_argument("--host", default="127.0.0.1", help=text)
    text = "a file with the token that clients must send (api_key); a file, because other users can read a command line"
    network.add_argument("--token_file", type=Path, metavar="FILE", help=text)
    computation = parser.add_argument_group("computation")
    computation.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    computation.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    text = f"number of texts that are generated at once (default: {DEFAULT_SLOTS})"
    computation.add_argument("--slots", type=int, default=DEFAULT_SLOTS, metavar="N", help=text)
    text = f"number of tokens that a prompt and its text may have together (default: model.seq_length, at most {DEFAULT_CONTEXT})"
    computation.add_argument("--context", type=int, metavar="N", help=text)
    limits = parser.add_argument_group("limits; a request over one is rejected")
    for limit in fields(Limits):
        text = f"{limit.metadata['help']} (default: {limit.default:,})"
        limits.add_argument(f"--{limit.name}", type=type(limit.default), default=limit.default, metavar="N", help=text)
    return parser


def checked_task(arguments: argparse.Namespace) -> Task:
    """Checks the command and binds its port."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Mistake(f"serve needs {' and '.join(missing)} → pip install -r requirements-serve.txt")
    refuse_launcher("serve")
    if arguments.slots < 1:
        raise Mistake(f"--slots {arguments.slots} does not work → use 1 or more")
    limits = Limits(**{limit.name: getattr(arguments, limit.name) for limit in fields(Limits)})
    token = _read_token(arguments)
    trained = find(arguments)
    model, template = writer_of("serve", trained.experiment.model, trained.folder.title), _read_template(arguments.chat_template)
    if arguments.context is not None:
        refuse_context(arguments.context, model)
    tokenizer = load_tokenizer(trained.experiment.data, ROOT, say)
    listener = _bind(arguments)
    return Task(**vars(trained), model=model, tokenizer=tokenizer, limits=limits, token=token, template=template, listener=listener)


def _read_token(arguments: argparse.Namespace) -> str | None:
    from research.serving import access

    if arguments.token_file is not None:
        return access.read_token(arguments.token_file)
    if not access.is_loopback(arguments.host):
        problem = f"--host {arguments.host} lets other machines in, and there is no token"
        raise Mistake(f"{problem} → add --token_file TOKEN, made with {access.MAKE_TOKEN}")
    return None


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    text = read_text(path, f"--chat_template {path}", "name a file of jinja text")
    if not 0 < len(text) <= LONGEST_TEMPLATE:
        raise Mistake(f"--chat_template {path} is empty, or longer than {LONGEST_TEMPLATE} characters → name a file of jinja text")
    return text


def _bind(arguments: argparse.Namespace) -> socket.socket:
    """Binds a socket to the address. It does not listen, so connections are refused until the model is loaded."""
    host, port = arguments.host.strip("[]"), arguments.port
    if not 0 <= port < 2**16:
        raise Mistake(f"--port {port} does not work → use 1 to 65535, 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # a host name that cannot be encoded is no OSError
        reason = getattr(error, "strerror", None) or "no such host name"
        raise Mistake(f"--host {host} --port {port} cannot be used ({reason}) → another --port, 0 for any that is free") from None
    return listener


def cache_bytes(model: GPT | T5, slots: int, context: int, tensor: int, bytes_per_number: int) -> int:
    """Size of the KV cache on one of `tensor` ranks; of an encoder–decoder for sources and targets."""
    heads, places = max(model.num_kv_heads // tensor, 1), context + (model.source_length if isinstance(model, T5) else 0)
    return 2 * model.num_layers * slots * heads * places * model.head_size * bytes_per_number


def _check_memory(task: Task) -> None:
    """Raises a Mistake if the KV cache is larger than this machine's memory. On a GPU, torch reports that itself."""
    import psutil
    import torch

    slots, total = task.arguments.slots, psutil.virtual_memory().total
    needed = cache_bytes(task.model, slots, task.context, 1, 4)
    if not torch.cuda.is_available() and needed > total:
        size = f"a cache of {slots} slots × {task.context} tokens needs {memory(needed / 1e6)}"
        raise Mistake(f"{size}, this machine has {memory(total / 1e6)} → fewer --slots, or less --context")


def _announce(task: Task, running: "Running") -> None:
    """Prints what is served, where, and a command to try it."""
    from models.estimates.parameters import parameters
    from models.inference.decoder import Decoder

    service, decoder = running.service, running.engine.generator.decoder
    assert isinstance(decoder, Decoder)
    cache = "none" if decoder.uncached else memory(decoder.cache_bytes / 1e6)
    per_rank = f" on each of {task.arguments.tensor} tensor ranks" if task.arguments.tensor > 1 else ""
    counted = parameters(task.model)  # None with classes of variant.py
    size = f" · {compact(counted)} parameters" if counted else ""
    template = service.chat_template
    ends = " ".join(repr(end) for end in (*map(service.tokenizer.backend.id_to_token, template.end_ids), *template.stops))
    access = "with the token" if task.token else "this machine only"
    bearer = f' -H "Authorization: Bearer $(cat {task.arguments.token_file})"' if task.token else ""
    example = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
    _log(f"serve    {service.name} · step {service.step}{size} · {service.precision}")
    _log(f"cache    {service.slots} slots × {service.context} tokens · {cache}{per_rank} · {task.limits.queue} more may wait")
    if decoder.uncached:
        _log(f"warning  {decoder.uncached}")
    _log(f"chat     template: {template.name} · a turn ends at {ends}")
    _log(f"address  {task.address} · {access} · a page to chat: {task.address}/")
    _log(f"try      curl {task.address}/v1/chat/completions{bearer} -H 'Content-Type: application/json' -d '{example}'")


def _log(line: str) -> None:
    """Prints a line of the log. The server goes on if the reader of its output has ended or the disk is full."""
    with contextlib.suppress(OSError):
        print(printable(line), flush=True)
