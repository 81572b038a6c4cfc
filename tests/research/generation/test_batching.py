"""Requests that come and go in a shared cache get what each would get alone."""

import random

import pytest
import torch

from models.inference.decoder import Decoder
from models.inference.sampling_params import GREEDY, SamplingParams
from parallel.errors import Mistake
from research.generation.batching import CANCELLED, END, STOP, BatchScheduler, Generation, Request
from tests.models.helpers.build import ALONE
from tests.models.helpers.decoding import DRAWN, LENGTH, filled, logits_of, longer

MODEL = longer(position="rotary", num_kv_heads=2)


def batch(slots: int, vocab_size: int = 83) -> BatchScheduler:
    return BatchScheduler(Decoder(filled(MODEL), MODEL, ALONE, slots, LENGTH), vocab_size)


def done(batch: BatchScheduler, requests: list[Request]) -> list[Generation]:
    written = [batch.submit(request) for request in requests]
    while batch:
        batch.step()
    return written


def requests(count: int, choice: SamplingParams = GREEDY) -> list[Request]:
    """Of prompts and lengths of every kind, each with a seed of its own."""
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(83) for _ in range(rng.randint(1, 9))) for _ in range(count)]
    return [Request(prompt, rng.randint(1, 12), choice, seed) for seed, prompt in enumerate(prompts)]


@pytest.mark.parametrize("choice", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_sixty_four_at_once_get_what_each_gets_alone(slots, choice):
    """Token for token, in fp32, with as many rows, and with so few that they wait and take each other's places."""
    asked = requests(64, choice)
    together, one = done(batch(slots), asked), batch(1)
    for request, written in zip(asked, together, strict=True):
        assert written.ids == done(one, [request])[0].ids
        assert len(written.ids) == request.max_new_tokens and written.finish == "length"


def test_requests_that_come_late_change_nothing():
    """One more is submitted after every second step."""
    asked, running, written = requests(20), batch(4), []
    for request in asked:
        written.append(running.submit(request))
        running.step()
        running.step()
    while running:
        running.step()
    assert [each.ids for each in written] == [each.ids for each in done(batch(20), asked)]


def test_greedy_is_the_highest_logit_of_the_plain_model():
    module, (written,) = filled(MODEL), done(batch(1), [Request((5, 6), 8)])
    ids = [5, 6]
    for token in written.ids:
        assert token == int(logits_of(module, MODEL, ids).argmax())
        ids.append(token)


def test_a_text_ends_with_an_end():
    (free,) = done(batch(1), [Request((5, 6), 12)])
    end = free.ids[4]
    (written,) = done(batch(1), [Request((5, 6), 12, ends=(end, 1000))])
    assert written.ids == free.ids[: free.ids.index(end) + 1] and written.finish == END


def test_only_ids_of_the_tokenizer_are_written():
    assert all(token < 10 for written in done(batch(4, 10), requests(8)) for token in written.ids)


def test_a_request_can_be_ended_while_it_waits_or_runs():
    running = batch(2)
    first, second, third = (running.submit(Request((i,), 10)) for i in (1, 2, 3))
    running.step()
    running.step()
    running.end(first, STOP)
    running.end(third, CANCELLED)
    assert (first.finish, third.finish) == (STOP, CANCELLED) and third.ids == []
    while running:
        running.step()
    assert second.ids == done(batch(1), [Request((2,), 10)])[0].ids and len(first.ids) == 2
    assert running.decoder.free == 2


def test_logprobs_are_those_of_the_model_whatever_is_drawn():
    """Of the plain model without a cache, 1e-4; and as many as each request asked for."""
    asked = [Request((5, 6), 4, DRAWN, 3, logprobs=2), Request((7,), 4, logprobs=0), Request((8,), 4)]
    some, alone, none = done(batch(3), asked)
    assert none.logprobs == [] and all(top == [] for _, top in alone.logprobs)
    ids, module = [5, 6], filled(MODEL)
    for token, (own, top) in zip(some.ids, some.logprobs, strict=True):
        true = logits_of(module, MODEL, ids).log_softmax(-1)
        assert own == pytest.approx(float(true[token]), abs=1e-4)
        assert [i for i, _ in top] == true.topk(2).indices.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(true.topk(2).values.tolist(), abs=1e-4)
        ids.append(token)


def test_a_model_of_nan_is_refused():
    running = batch(1)
    with torch.no_grad():
        running.decoder.module.embedding.weight.fill_(torch.nan)
    running.submit(Request((1,), 3))
    with pytest.raises(Mistake, match="not finite"):
        running.step()
