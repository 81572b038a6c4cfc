"""A live engine that is asked in the middle of training answers as fp64 formulas do, and trains on as if nobody had asked. Bit for bit."""

import functools

import pytest
import torch

from models.config import GPT
from models.inference.sampling import Row, next_tokens
from models.inference.sampling_params import GREEDY, SamplingParams
from parallel.engines.engine import Engine
from parallel.errors import Mistake
from research.evaluation.scorer import ScoreRequest
from research.reliability.signals import CutShort
from research.training.live_model import Live, LiveDecoder, LiveScorer
from tests.harness import run_ranks
from tests.models.helpers import reference, undecodable
from tests.parallel.helpers import training
from tests.parallel.helpers.training import MODEL

CLOSE = 1e-5
DROPPING = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
SMALL = {"num_layers": 2}
LAYOUTS = {  # name: ranks, settings
    "1": (1, dict(micro=2)),
    "TP2": (2, dict(tensor=2)),
    "PP2": (2, dict(pipe=2, micro=4)),
    "DP2": (2, dict(micro=2)),
    "ZeRO-2, offload": (2, dict(zero_stage=2, offload_optimizer=True, micro=2)),
    "ZeRO-3": (2, dict(zero_stage=3, micro=2)),
    "TP2·PP2": (4, dict(tensor=2, pipe=2, micro=4)),
    "PP2·DP2": (4, dict(pipe=2, micro=2)),
}
FURTHER = {
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "TP2·SP, full": (2, dict(tensor=2, sequence=True, recompute="full", micro=2)),
    "TP2·PP2·SP, selective": (4, dict(tensor=2, pipe=2, sequence=True, recompute="selective")),
    "TP2·DP2": (4, dict(tensor=2, micro=1)),
    "TP2·ZeRO-3": (4, dict(tensor=2, zero_stage=3, micro=2)),
    "ZeRO-3, all offloaded, full": (2, dict(zero_stage=3, offload_optimizer=True, offload_parameters=True, recompute="full", micro=2)),
}
PRECISIONS, DROPS = ("fp32", "bf16"), (False, True)
FAST = [(layout, "fp32", layout == "TP2·PP2") for layout in ("1", "TP2·PP2")]
EVERY = [(layout, precision, drops) for layout in LAYOUTS | FURTHER for precision in PRECISIONS for drops in DROPS]
SLOW = [*(case for case in EVERY if case not in FAST), ("PP2", "fp16", True), ("ZeRO-3", "fp16", True)]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]

SEQUENCES = [tuple((7 * i + j * (i + 2)) % 83 for j in range(length)) for i, length in enumerate([17, 2, 5, 9, 16, 3, 3, 12, 17, 4, 8])]
ASKED = [ScoreRequest(ids, max(1, len(ids) // 2)) for ids in SEQUENCES]
PROMPTS = [[5], [1, 2, 3], [60, 61, 62, 63, 64]]
DRAWN = SamplingParams(temperature=0.9, top_k=20)


def written(live: Live, choice: SamplingParams) -> list[list[int]]:
    """Seven tokens after each prompt, the second of which leaves after three."""
    decoder, found = LiveDecoder(live), [list[int]() for _ in PROMPTS]
    logits, rows = decoder.admit(PROMPTS), list(range(len(PROMPTS)))
    for i in range(7):
        tokens = next_tokens(logits, [Row(choice, 10 + k, PROMPTS[k], found[k]) for k in rows])
        for k, token in zip(rows, tokens, strict=True):
            found[k].append(token)
        if i == 2:
            decoder.drop(1)
            rows = [0, 2]
        logits = decoder.step([found[k][-1] for k in rows])
    return found


def trained(engine: Engine, shape: GPT, grid, asked: bool) -> dict:
    """Four steps with a validation after each; where asked for, scores and texts after the second and the third."""
    torch.manual_seed(1)
    found: dict = {"loss": [], "norm": [], "eval": []}
    for step in range(4):
        found["loss"].append(engine.train_batch(training.micro_batches(step, shape, grid, engine.settings.micro_batch_size), 1e-2).hex())
        found["norm"].append(engine.gradient_norm().hex())
        if asked and step in (1, 2):
            live = Live(engine, shape)
            found["weights"] = dict(engine.full_weights())
            found["scores"] = [(one.logprobs, one.greedy) for one in LiveScorer(live).score(ASKED)]
            found["texts"] = [written(live, choice) for choice in (GREEDY, DRAWN)]
        found["eval"].append(training.evaluate(engine, shape, grid).hex())
    counters = (engine.skipped_steps, engine.loss_scale, engine.deepspeed.global_steps, engine.deepspeed.micro_steps)
    found["state"] = (torch.get_rng_state(), *counters)
    found["end"] = dict(engine.full_weights())
    return found


def both(settings: dict) -> tuple[dict, dict]:
    """Asked, and left alone."""
    return trained(*training.build(**settings), asked=True), trained(*training.build(**settings), asked=False)


@functools.cache
def run(layout: str, precision: str, drops: bool) -> list[tuple[dict, dict]]:
    world, settings = (LAYOUTS | FURTHER)[layout]
    return run_ranks(both, world, dict(settings, precision=precision, model=SMALL | (DROPPING if drops else {})))


@pytest.mark.parametrize(("layout", "precision", "drops"), CASES)
def test_training_goes_on_as_if_nobody_had_asked(layout: str, precision: str, drops: bool) -> None:
    for asked, alone in run(layout, precision, drops):
        assert {key: asked[key] for key in ("loss", "norm", "eval")} == {key: alone[key] for key in ("loss", "norm", "eval")}
        assert asked["end"].keys() == alone["end"].keys()
        assert all(torch.equal(asked["end"][name], alone["end"][name]) for name in alone["end"])
        assert torch.equal(asked["state"][0], alone["state"][0]) and asked["state"][1:] == alone["state"][1:]


def log_probabilities(weights: dict[str, torch.Tensor], model: GPT, ids: tuple[int, ...]) -> torch.Tensor:
    """'s v' in fp64, from the formulas: no slice, no padding, no other sequence beside it."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = (weights["embedding.weight"][torch.tensor(ids)] + weights["position.weight"][: len(ids)])[None]
    for block in (f"blocks.{i}" for i in range(model.num_layers)):
        x = x + reference.attention(reference.norm(x, weights, f"{block}.attention_norm", model), weights, f"{block}.attention", model)
        x = x + reference.mlp(reference.norm(x, weights, f"{block}.mlp_norm", model), weights, f"{block}.mlp")
    return (reference.norm(x, weights, "final_norm", model)[0] @ weights["embedding.weight"].T).log_softmax(-1)


def weights_and_rank(layout: str, precision: str, drops: bool) -> tuple[dict, GPT, dict]:
    """The whole model's weights when it was asked, and rank 0's answers; every rank has the same ones."""
    ranks = [asked for asked, _ in run(layout, precision, drops)]
    first = ranks[0]
    assert all(rank["scores"] == first["scores"] and rank["texts"] == first["texts"] for rank in ranks)
    return {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}, GPT(**MODEL | SMALL), first


EXACT = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case[1] == "fp32")]


@pytest.mark.parametrize(("layout", "precision", "drops"), EXACT)
def test_scores_are_those_of_the_formulas(layout: str, precision: str, drops: bool) -> None:
    weights, model, rank = weights_and_rank(layout, precision, drops)
    for asked, (logprobs, greedy) in zip(ASKED, rank["scores"], strict=True):
        expected = log_probabilities(weights, model, asked.ids[:-1])[-asked.scored :]
        targets = torch.tensor(asked.ids[-asked.scored :])
        assert (torch.tensor(logprobs) - expected.gather(1, targets[:, None])[:, 0]).abs().max() < CLOSE
        assert list(greedy) == (expected.argmax(-1) == targets).tolist()


@pytest.mark.parametrize(("layout", "precision", "drops"), EXACT)
def test_texts_are_those_of_the_formulas(layout: str, precision: str, drops: bool) -> None:
    """Token by token from the same logits, up to where a text leaves."""
    weights, model, rank = weights_and_rank(layout, precision, drops)
    for choice, texts in zip((GREEDY, DRAWN), rank["texts"], strict=True):
        for k, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            assert len(text) == (3 if k == 1 else 7)
            logits = log_probabilities(weights, model, (*prompt, *text))[len(prompt) - 1 :].float()
            for i, token in enumerate(text):
                assert next_tokens(logits[i : i + 1], [Row(choice, 10 + k, prompt, text[:i])]) == [token]
    assert rank["texts"][0] != rank["texts"][1]


def asked_to_stop(settings: dict) -> tuple[int, str]:
    """Passes until somebody asks to stop, and what is raised."""
    engine, shape, _ = training.build(**settings)
    passes = []

    def go_on() -> bool:
        passes.append(1)
        return len(passes) < 3

    try:
        LiveScorer(Live(engine, shape, go_on)).score(ASKED * 4)
    except CutShort as cut:
        return len(passes), type(cut).__name__
    return len(passes), "nothing"


def test_who_asks_to_stop_is_heard_before_the_next_pass() -> None:
    assert run_ranks(asked_to_stop, 2, dict(pipe=2, micro=2, model=SMALL)) == [(3, "CutShort")] * 2


def refused(name: str, settings: dict) -> str:
    """What is said of a model with this block of a variant.py on this layout; "" if nothing is refused."""
    block = {"residual": f"variant:{name}", **SMALL}
    engine, shape, _ = training.build(model=block, variants={name: getattr(undecodable, name)}, micro=2, **settings)
    try:
        Live(engine, shape).refuse_dependent_logits()
    except Mistake as mistake:
        return str(mistake)
    return ""


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("LookAheadBlock", {"pipe": 2}, "token 1 of a text gets other logits among 16 tokens than among 1 (off by 0."),
        ("NeedsFourBlock", {}, "classes of variant.py cannot compute a text of 1 token (ValueError: 1 tokens are fewer than 4) → let"),
        pytest.param("LookAheadBlock", {}, "among 16 tokens than among 1 (off by 0.", marks=pytest.mark.slow),
        pytest.param("LookAheadBlock", {"tensor": 2, "sequence": True}, "among 16 tokens than among 1 (off", marks=pytest.mark.slow),
        pytest.param("WindowBlock", {}, "", marks=pytest.mark.slow),
        pytest.param("WindowBlock", {"pipe": 2}, "", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_that_looks_ahead_is_not_evaluated_and_a_window_is(name: str, settings: dict, said: str) -> None:
    """On every rank alike. A model that looks ahead sees padding: its scores and samples would be those of the padding."""
    first, second = run_ranks(refused, 2, name, settings)
    assert first == second and said in first and bool(said) == bool(first)
