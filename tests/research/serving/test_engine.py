"""The engine without HTTP: commands in, pieces out. A failed text gets an error, and other texts are not affected."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from parallel.errors import Mistake
from parallel.grid import Grid
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec
from research.generation.settings import GenerationSettings
from research.serving.engine import FAILED, Cancel, Engine, Halt, Job, Submit
from research.serving.prometheus import Metrics
from tests.research.serving.helpers.servers import PATIENCE


class Written(list):
    """What was handed out."""

    def of(self, job: Job) -> list:
        return [piece for step in self for other, piece in step if other is job]


@pytest.fixture
def writer(small):
    plan = DecoderSpec(small.path, small.checkpoints / "step_000003", slots=2, context=64)
    experiment = serialization.load(small.config)
    return TextGenerator(plan.on(Grid()), load_tokenizer(experiment.data, Path("/")), experiment.model, 64)


def job(writer, prompt="war", tokens=6, **ask) -> Job:
    return Job(writer.tokenizer.prompt(prompt), GenerationSettings(tokens, **ask), ())


def run(writer, orders, watch=lambda engine, step: None, last=()) -> Written:
    """Carries out the orders, then Halt once all of their jobs, or those of `last`, have ended; `watch` sees each step."""
    written = Written()
    engine = Engine(writer, lambda pieces: (written.append(pieces), watch(engine, pieces)), Metrics(2))
    for order in orders:
        engine.commands.put(order)
    left = set(last) or {each for order in orders if isinstance(order, Submit) for each in order}

    def deliver(pieces, inner=engine.deliver):
        inner(pieces)
        left.difference_update(each for each, piece in pieces if piece.finish)
        if not left:
            engine.commands.put(Halt())

    engine.deliver = deliver
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return written


def test_pieces_add_up_and_the_last_says_why(writer):
    jobs = [job(writer, prompt, logprobs=1) for prompt in ("war", "the people", "peace")]
    written = run(writer, [Submit(jobs)])
    for each in jobs:
        pieces = written.of(each)
        assert "".join(piece.text for piece in pieces) == each.text.text
        assert [token.id for piece in pieces for token in piece.tokens] == each.text.generation.ids
        assert [piece.finish for piece in pieces] == [None] * 5 + ["length"] and pieces[-1].count == 6


def test_who_is_cancelled_leaves_and_the_others_go_on(writer):
    gone, stays = job(writer, tokens=50), job(writer, "the people")

    def watch(engine, pieces):
        if any(each is stays and piece.count == 3 for each, piece in pieces):
            engine.commands.put(Cancel([gone]))
            engine.commands.put(Cancel([gone]))

    written = run(writer, [Submit([gone, stays])], watch)
    assert written.of(gone)[-1].finish == "cancelled" and len(written.of(gone)) == 4
    assert written.of(stays)[-1].finish == "length" and writer.decoder.free == 2 and not writer


def test_one_that_does_not_fit_fails_alone(writer):
    long, short = job(writer, tokens=64), job(writer)
    written = run(writer, [Submit([long, short])])
    assert written.of(long)[0].finish == FAILED and "does not slide" in written.of(long)[0].error
    assert written.of(short)[-1].finish == "length"


def test_a_model_without_numbers_fails_all_of_its_texts_and_serves_the_next(writer, monkeypatch):
    step, broken = writer.scheduler.__class__.step, [True]

    def failing(batch):
        moved = step(batch)
        if broken.pop() if broken else False:
            raise Mistake("the model's logits are not finite")
        return moved

    monkeypatch.setattr(writer.scheduler.__class__, "step", failing)
    first, second = job(writer), job(writer)

    def watch(engine, pieces):
        if pieces and pieces[0][1].finish == FAILED:
            engine.commands.put(Submit([second]))

    written = run(writer, [Submit([first])], watch, last=[first, second])
    assert [piece.error for piece in written.of(first)] == ["the model's logits are not finite"]
    assert written.of(second)[-1].finish == "length" and writer.decoder.free == 2


def test_any_other_error_is_told_and_ends_the_engine(writer, monkeypatch):
    def broken():
        raise RuntimeError("out of memory, with a secret")

    monkeypatch.setattr(writer, "step", broken)
    told = []
    engine = Engine(writer, told.extend, Metrics(2))
    engine.commands.put(Submit([job(writer)]))
    with pytest.raises(RuntimeError):
        engine.run()
    ((_, piece),) = told
    assert piece.finish == FAILED and "RuntimeError" in piece.error and "secret" not in piece.error


def test_halt_ends_what_is_under_way(writer):
    under_way, waiting = [job(writer, tokens=50) for _ in range(2)], [job(writer) for _ in range(3)]
    halt = {2: Halt()}
    written = run(writer, [Submit([*under_way, *waiting])], lambda engine, pieces: engine.commands.put(halt.get(len(pieces), Cancel())))
    assert all("shutting down" in written.of(each)[-1].error for each in (*under_way, *waiting))
