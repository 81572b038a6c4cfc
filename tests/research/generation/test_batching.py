"""Requests that are admitted and leave at different times get the same tokens as each would get alone."""

import functools
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


def scheduler(slots: int, vocab_size: int = 83) -> BatchScheduler:
    return BatchScheduler(Decoder(filled(MODEL), MODEL, ALONE, slots, LENGTH), vocab_size)


def finished(scheduler: BatchScheduler, requests: list[Request]) -> list[Generation]:
    generations = [scheduler.submit(request) for request in requests]
    while scheduler:
        scheduler.step()
    return generations


def requests(count: int, sampling: SamplingParams = GREEDY) -> list[Request]:
    """Prompts of 1 to 9 tokens with 1 to 12 new ones, each with its own seed."""
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(83) for _ in range(rng.randint(1, 9))) for _ in range(count)]
    return [Request(prompt, rng.randint(1, 12), sampling, seed) for seed, prompt in enumerate(prompts)]


@functools.cache
def each_alone(count: int, sampling: SamplingParams) -> list[list[int]]:
    """The ids of each of the requests, submitted when the one before it is finished."""
    one = scheduler(1)
    return [finished(one, [request])[0].ids for request in requests(count, sampling)]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_sixty_four_at_once_get_what_each_gets_alone(slots, sampling):
    """Equal ids in fp32, with one row per request, and with so few rows that requests wait and take each other's places."""
    submitted = requests(64, sampling)
    together = finished(scheduler(slots), submitted)
    assert [generation.ids for generation in together] == each_alone(64, sampling)
    for request, generation in zip(submitted, together, strict=True):
        assert len(generation.ids) == request.max_new_tokens and generation.finish == "length"


def test_requests_that_come_late_change_nothing():
    """One more is submitted after every second step."""
    running, generations = scheduler(4), []
    for request in requests(20):
        generations.append(running.submit(request))
        running.step()
        running.step()
    while running:
        running.step()
    assert [generation.ids for generation in generations] == [one.ids for one in finished(scheduler(20), requests(20))]


def test_greedy_is_the_highest_logit_of_the_plain_model():
    module, (generation,) = filled(MODEL), finished(scheduler(1), [Request((5, 6), 8)])
    ids = [5, 6]
    for token in generation.ids:
        assert token == int(logits_of(module, MODEL, ids).argmax())
        ids.append(token)


def test_an_end_id_ends_a_generation():
    (free,) = finished(scheduler(1), [Request((5, 6), 12)])
    end = free.ids[4]
    (ended,) = finished(scheduler(1), [Request((5, 6), 12, ends=(end, 1000))])
    assert ended.ids == free.ids[: free.ids.index(end) + 1] and ended.finish == END


def test_only_ids_of_the_tokenizer_are_written():
    assert all(token < 10 for generation in finished(scheduler(4, 10), requests(8)) for token in generation.ids)


def test_a_request_can_be_ended_while_it_waits_or_runs():
    running = scheduler(2)
    first, second, third = (running.submit(Request((i,), 10)) for i in (1, 2, 3))
    running.step()
    running.step()
    running.end(first, STOP)
    running.end(third, CANCELLED)
    assert (first.finish, third.finish) == (STOP, CANCELLED) and third.ids == []
    while running:
        running.step()
    assert second.ids == finished(scheduler(1), [Request((2,), 10)])[0].ids and len(first.ids) == 2
    assert running.decoder.free == 2


def test_logprobs_are_those_of_the_model_whatever_is_drawn():
    """Equal to the plain model's without a cache to 1e-4, and as many as each request asks for."""
    some, alone, none = finished(scheduler(3), [Request((5, 6), 4, DRAWN, 3, logprobs=2), Request((7,), 4, logprobs=0), Request((8,), 4)])
    assert none.logprobs == [] and all(top == [] for _, top in alone.logprobs)
    ids, module = [5, 6], filled(MODEL)
    for token, (logprob, top) in zip(some.ids, some.logprobs, strict=True):
        true = logits_of(module, MODEL, ids).log_softmax(-1)
        assert logprob == pytest.approx(float(true[token]), abs=1e-4)
        assert [i for i, _ in top] == true.topk(2).indices.tolist()
        assert [likelihood for _, likelihood in top] == pytest.approx(true.topk(2).values.tolist(), abs=1e-4)
        ids.append(token)


def test_a_model_of_nan_is_refused():
    running = scheduler(1)
    with torch.no_grad():
        running.decoder.module.embedding.weight.fill_(torch.nan)
    running.submit(Request((1,), 3))
    with pytest.raises(Mistake, match="not finite"):
        running.step()
