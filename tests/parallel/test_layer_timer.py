"""The time of layers that sleep: what each pass takes is known, whatever else the machine does."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.layer_timer import Label, LayerTimer

FORWARD, BACKWARD = 0.02, 0.05


class Sleep(torch.autograd.Function):
    """x -> x²; both passes take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(BACKWARD)
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Sleeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x)


class Block(nn.Module):
    """A residual block of two modules, one of which returns what it is given, as dropout without a rate does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.dropout, self.mlp = Sleeper(), nn.Identity(), Sleeper()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(x))
        return x + self.mlp(x)


class Recomputed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def took(block: Block, steps: int = 1) -> tuple[dict[str, tuple[float, int]], Tensor]:
    """label -> (seconds, times) of a block and a loss, with data and an optimizer that sleep; and the gradient."""
    timer, x = LayerTimer(torch.device("cpu")), torch.ones(2, requires_grad=True)
    layer, loss = timer.within("blocks.0", block), timer.within("loss", torch.sum)
    loss(layer(x)).backward()  # before it begins, nothing is noted
    x.grad = None
    for _ in range(steps):
        timer.begin()
        with timer.during(Label("data")):
            time.sleep(FORWARD)
        loss(layer(x)).backward()
        time.sleep(BACKWARD)
        with timer.during(Label("optimizer")):
            time.sleep(FORWARD)
        timer.end()
    timer.remove()
    assert not block.mlp._forward_hooks and not block.mlp._forward_pre_hooks
    loss(layer(x.detach()))
    return {str(label): (spent.seconds, spent.times) for label, spent in timer.spent().items()}, x.grad


def test_every_pass_gets_the_time_that_it_takes() -> None:
    found, gradient = took(Block(), steps=2)
    assert torch.equal(gradient, torch.full((2,), 2 * 15.0))  # (1 + 2) at 1, times (1 + 4) at 2, in two steps: watching changes nothing
    known = {
        "data": FORWARD,
        "forward blocks.0.attention": FORWARD,
        "forward blocks.0.mlp": FORWARD,
        "backward blocks.0.mlp": BACKWARD,
        "backward blocks.0.attention": BACKWARD,
        "other": BACKWARD,
        "optimizer": FORWARD,
    }
    for label, seconds in known.items():
        assert found[label][0] >= 2 * seconds, label
    assert set(found) >= {"forward blocks.0", "backward blocks.0", "forward loss", "backward loss", "forward blocks.0.dropout"}
    assert "backward blocks.0.dropout" not in found
    assert found["backward blocks.0"][1] == found["backward loss"][1] == 2


def test_a_forward_pass_that_is_repeated_is_told_from_the_backward_pass() -> None:
    found, gradient = took(Recomputed())
    assert torch.equal(gradient, torch.full((2,), 15.0))
    for part in ("attention", "mlp"):
        assert found[f"forward blocks.0.{part}"][0] >= FORWARD and found[f"backward blocks.0.{part}"][0] >= BACKWARD
        assert found[f"recomputed blocks.0.{part}"] >= (FORWARD, 1)


def test_the_labels_add_up_to_the_whole_time() -> None:
    timer = LayerTimer(torch.device("cpu"))
    began = time.perf_counter()
    timer.begin()
    inner = time.perf_counter()
    with timer.during(Label("data")):
        time.sleep(FORWARD)
    inner = time.perf_counter() - inner
    timer.end()
    whole = time.perf_counter() - began
    assert FORWARD < inner <= sum(spent.seconds for spent in timer.spent().values()) <= whole
    timer.mark(Label("data"))
    with timer.during(Label("data")):
        assert not timer.active and sum(spent.times for spent in timer.spent().values()) == 3
