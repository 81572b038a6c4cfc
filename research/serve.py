"""`python -m research serve RUN`: a trained model answers over HTTP, many clients at once."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from parallel.errors import Mistake
from research.describe import compact
from research.serving.task import Task, cache_bytes, parser, prepared
from research.text import memory
from research.trained import ROOT

if TYPE_CHECKING:
    from models.decoder import Decoder
    from research.serving.conversation import Conversation
    from research.serving.running import Running

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    task = prepared(parser().parse_args(argv))
    with ready(task) as running:
        for number in SIGNALS:
            signal.signal(number, lambda *_: running.stop())
        _announce(task, running)
        running.run()
    _say("stopped")


@contextlib.contextmanager
def ready(task: Task) -> Iterator["Running"]:
    """The model, restored, on as many tensor ranks as asked for, behind a server that has not begun."""
    from research.hf_tokenizer import ends_of
    from research.restore import Plan
    from research.serving.running import Running
    from research.tensor_ranks import opened
    from research.writer import Writer

    _refuse_memory(task)
    arguments, ends = task.arguments, ends_of(task.tokenizer, ROOT)
    plan = Plan(task.folder.path, task.checkpoint, arguments.precision, arguments.slots, task.context)
    with conversation(task, ends) as how, opened(plan, arguments.tensor) as decoder:
        writer = Writer(decoder, task.tokenizer, task.experiment.model, task.context, ends)
        yield Running(_service(task, decoder, ends, how), writer, task.listener, _say)


@contextlib.contextmanager
def conversation(task: Task, ends: tuple[int, ...]) -> Iterator["Conversation"]:
    """By the template that was named, or the run's own, or plainly."""
    from research.hf_tokenizer import TEMPLATE, special_tokens_of, template_of
    from research.serving.conversation import Plain, Templated
    from research.serving.renderer import Renderer

    source = task.template or template_of(task.tokenizer, ROOT)
    if source is None:
        yield Plain(task.tokenizer, ends)
        return
    renderer = Renderer(source, task.limits.template_seconds)
    name = task.arguments.chat_template.name if task.template else TEMPLATE
    try:
        yield Templated(task.tokenizer, renderer.render, special_tokens_of(task.tokenizer, ROOT), ends, name)
    finally:
        renderer.close()


def _service(task: Task, decoder: "Decoder", ends: tuple[int, ...], how: "Conversation") -> Any:
    from research.serving.access import Access
    from research.serving.call import Desk
    from research.serving.metrics import Metrics
    from research.serving.service import Service

    slots, metrics = task.arguments.slots, Metrics(task.arguments.slots)
    return Service(
        name=task.folder.title,
        step=int(task.checkpoint.name.removeprefix("step_")),
        precision=_precision(decoder),
        created=int(time.time()),
        model=task.experiment.model,
        tokenizer=task.tokenizer,
        context=task.context,
        slots=slots,
        ends=ends,
        conversation=how,
        limits=task.limits,
        access=Access(task.token),
        metrics=metrics,
        desk=Desk(slots, task.limits, metrics),
    )


def _precision(decoder: "Decoder") -> str:
    from research.restore import PRECISIONS

    dtype = next(decoder.module.parameters()).dtype
    return next(name for name, known in PRECISIONS.items() if known == dtype)


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
    from models.count import parameters
    from models.decoder import Decoder

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
