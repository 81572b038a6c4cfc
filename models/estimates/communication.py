"""What tensor ranks say to each other, in closed form: every collective of a micro-batch, by layer. No torch.

arXiv:1909.08053 (§3) counts four all-reduces of b·s·h per block; arXiv:2205.05198 (§4.2) replaces each by an all-gather and a
reduce-scatter. A variant's own class may say anything, so a model that names one has no closed form.
"""

from collections.abc import Iterator
from dataclasses import replace

from models.config import CHOICES, GPT, VARIANT
from parallel.traffic import Call

FORWARD, BACKWARD = "forward", "backward"


def has_closed_form(model: GPT) -> bool:
    """Whether every class of the model is one of ours."""
    return not any(getattr(model, setting).startswith(VARIANT) for setting in CHOICES)


def tensor_calls(model: GPT, tensor: int, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """All collectives along the tensor axis of one micro-batch's forward and backward pass, loss included."""
    if tensor == 1:
        return []
    size = micro_batch * model.seq_length * model.hidden_size
    found = [*_embedding(sequence, size), *_position(model, sequence)]
    for i in range(model.num_layers):
        found += [replace(call, layer=f"blocks.{i}") for call in block_calls(model, tensor, sequence, recompute, micro_batch)]
    if model.residual != "post_norm":
        found += _partial("final_norm", "h", model.hidden_size, norm_parameters(model) if sequence else 0)
    found += [*_head(sequence, size), *_loss(micro_batch * model.seq_length)]
    return [replace(call, ranks=call.ranks or tensor) for call in found]


def block_calls(model: GPT, tensor: int, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """Of one block: two sliced regions to enter and leave, shared kv heads, and parameters whose gradients are partial sums."""
    size = micro_batch * model.seq_length * model.hidden_size
    forward = [*_entered_and_left(sequence, size), *_shared_heads(model, tensor, micro_batch)]
    found = [*forward, *map(_conjugate, forward)] if sequence else [*forward, *_entered(size), *map(_conjugate, forward[1:])]
    if recompute == "full":
        found += _again(model, sequence, forward)
    outside = 2 * norm_parameters(model) + 2 * model.bias  # both norms, both row biases
    found += _partial("", "h", model.hidden_size, outside if sequence else 0)
    return found + list(_partial("", "e", model.head_size, 2 * norm_parameters(model) if model.qk_norm else 0))


def _call(layer: str, direction: str, operation: str, formula: str, elements: int, times: int = 1, ranks: int = 0) -> Call:
    """ranks = 0: all tensor ranks."""
    return Call("tensor", layer, direction, operation, formula, elements, times, ranks)


def norm_parameters(model: GPT) -> int:
    """Of one norm: a weight, and a bias where a layernorm has one."""
    return 2 if model.norm == "layernorm" and model.bias else 1


def _entered_and_left(sequence: bool, size: int) -> list[Call]:
    """Forward: attention and MLP are each entered and left."""
    if not sequence:
        return [_call("", FORWARD, "all_reduce", "b·s·h", size, 2)]
    return [_call("", FORWARD, operation, "b·s·h", size, 2) for operation in ("all_gather", "reduce_scatter")]


def _entered(size: int) -> list[Call]:
    """Backward of entering a region of whole activations: the gradients of the ranks' slices are summed."""
    return [_call("", BACKWARD, "all_reduce", "b·s·h", size, 2)]


def _conjugate(call: Call) -> Call:
    """The backward pass of a gather is a reduce-scatter, and the other way round."""
    operation = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}[call.operation]
    return replace(call, direction=BACKWARD, operation=operation)


def _shared_heads(model: GPT, tensor: int, micro_batch: int) -> list[Call]:
    """Fewer kv heads than tensor ranks: k and v of one head are each gathered among the ranks that use it."""
    if tensor <= model.num_kv_heads:
        return []
    size = micro_batch * model.seq_length * model.head_size
    return [_call("", FORWARD, "all_gather", "b·s·e", size, 2, tensor // model.num_kv_heads)]


def _again(model: GPT, sequence: bool, forward: list[Call]) -> Iterator[Call]:
    """Full recomputation issues the forward pass again, inside the backward pass.

    Torch stops it once all that the backward pass reads is there. The last reduction of a block is then left out, unless something
    behind it is read: a dropout's mask, or a norm's input.
    """
    last_is_read = model.residual == "post_norm" or model.residual_dropout > 0
    last = "reduce_scatter" if sequence else "all_reduce"
    for call in forward:
        times = call.times - (call.operation == last and not last_is_read)
        yield replace(call, direction=BACKWARD, times=times)


def _partial(layer: str, formula: str, size: int, parameters: int) -> Iterator[Call]:
    """Parameters that every rank holds whole but uses for its own part of the work: their gradients are summed."""
    if parameters:
        yield _call(layer, BACKWARD, "all_reduce", formula, size, parameters)


def _embedding(sequence: bool, size: int) -> list[Call]:
    if not sequence:
        return [_call("embedding", FORWARD, "all_reduce", "b·s·h", size)]
    scattered = _call("embedding", FORWARD, "reduce_scatter", "b·s·h", size)
    return [scattered, _conjugate(scattered)]


def _position(model: GPT, sequence: bool) -> Iterator[Call]:
    learned = sequence and model.position == "learned"
    yield from _partial("position", "s·h", model.seq_length * model.hidden_size, int(learned))


def _head(sequence: bool, size: int) -> list[Call]:
    if not sequence:
        return [_call("head", BACKWARD, "all_reduce", "b·s·h", size)]
    gathered = _call("head", FORWARD, "all_gather", "b·s·h", size)
    return [gathered, _conjugate(gathered)]


def _loss(tokens: int) -> list[Call]:
    """The logits' maximum, then three sums; never b·s·V."""
    return [_call("loss", FORWARD, "all_reduce", "b·s", tokens), _call("loss", FORWARD, "all_reduce", "3·b·s", 3 * tokens)]
