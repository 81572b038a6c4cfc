"""Dense attention, MLP and norms from their formulas: the reference for the sliced ones."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.config import GPT

Weights = Mapping[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layernorm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rmsnorm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def norm(x: Tensor, weights: Weights, name: str, model: GPT) -> Tensor:
    return {"layernorm": layernorm, "rmsnorm": rmsnorm}[model.norm](x, weights, name, model.norm_eps)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x: Tensor, weights: Weights, name: str, activate: Callable[[Tensor], Tensor] = gelu_tanh) -> Tensor:
    return linear(activate(linear(x, weights, f"{name}.up")), weights, f"{name}.down")


def attention(x: Tensor, weights: Weights, name: str, model: GPT, slopes: Tensor | None = None) -> Tensor:
    """Head by head: softmax over the past of q·k/√e (− slope · distance), then v. Key head i serves queries [i·g, (i+1)·g)."""
    e, q_size, group = model.head_size, model.num_heads * model.head_size, model.num_heads // model.num_kv_heads
    kv_size = model.num_kv_heads * e
    q, k, v = linear(x, weights, f"{name}.qkv").split([q_size, kv_size, kv_size], dim=-1)
    t = torch.arange(x.shape[1])
    future, distance = t[None, :] > t[:, None], t[:, None] - t[None, :]
    heads = []
    for h in range(model.num_heads):
        kv = slice(h // group * e, (h // group + 1) * e)
        q_h, k_h, v_h = q[..., h * e : (h + 1) * e], k[..., kv], v[..., kv]
        if model.qk_norm:
            q_h, k_h = norm(q_h, weights, f"{name}.q_norm", model), norm(k_h, weights, f"{name}.k_norm", model)
        scores = q_h @ k_h.transpose(-1, -2) / math.sqrt(e)
        if slopes is not None:
            scores = scores - slopes[h] * distance
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v_h)
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.output")


def with_gradients(function: Callable[[Tensor, Weights], Tensor], x: Tensor, weights: Weights, dy: Tensor) -> dict[str, Tensor]:
    """What `tests.models.helpers.on_rank.run_part` returns, of a function of (x, weights)."""
    x = x.clone().requires_grad_()
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    y = function(x, weights)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **{name: tensor.grad for name, tensor in weights.items()}}
