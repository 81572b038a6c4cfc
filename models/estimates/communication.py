"""Communication of tensor parallelism in closed form: every collective of a micro-batch, by layer. Imports no torch.

arXiv:1909.08053 (§3) counts four all-reduces of b·s·h per block. Under sequence parallelism (arXiv:2205.05198, §4.2) each of them
is replaced by an all-gather and a reduce-scatter. A class of a variant.py may communicate anything, so a model that names one has
no closed form.
"""

from dataclasses import replace

from models.config import GPT, has_variants
from models.encoder_config import BERT, AnyModel
from parallel.traffic import Call

FORWARD, BACKWARD = "forward", "backward"
CONJUGATE = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_reduce": "all_reduce"}
"""The collective of the forward pass -> that of its backward pass."""


def has_closed_form(model: AnyModel) -> bool:
    """Whether the model's communication and parameters can be computed from its settings: not with classes of a variant.py."""
    return isinstance(model, GPT | BERT) and not has_variants(model)


def tensor_calls(model: AnyModel, tensor: int, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """All collectives on the tensor axis in one micro-batch's forward and backward pass, loss included."""
    if tensor == 1:
        return []
    assert isinstance(model, GPT | BERT)
    tokens = micro_batch * model.seq_length
    size = tokens * model.hidden_size
    calls = []

    # The output of the embedding is summed over the ranks, each of which looks up its own vocabulary rows.
    if sequence:
        calls += [_call("embedding", FORWARD, "reduce_scatter", "b·s·h", size), _call("embedding", BACKWARD, "all_gather", "b·s·h", size)]
    else:
        calls += [_call("embedding", FORWARD, "all_reduce", "b·s·h", size)]
    if sequence and model.position == "learned":  # each rank adds the rows of its own positions
        calls += [_call("position", BACKWARD, "all_reduce", "s·h", model.seq_length * model.hidden_size)]
    if sequence and isinstance(model, BERT):
        calls += _bert_calls(model, micro_batch)

    for i in range(model.num_layers):
        calls += [replace(call, layer=f"blocks.{i}") for call in block_calls(model, tensor, sequence, recompute, micro_batch)]

    if sequence and model.residual != "post_norm":
        calls += [_call("final_norm", BACKWARD, "all_reduce", "h", model.hidden_size, norm_parameters(model))]
    if sequence:
        calls += [_call("head", FORWARD, "all_gather", "b·s·h", size), _call("head", BACKWARD, "reduce_scatter", "b·s·h", size)]
    else:
        calls += [_call("head", BACKWARD, "all_reduce", "b·s·h", size)]

    # The maximum of the logits, then three sums. The b·s·V logits themselves are never sent.
    calls += [_call("loss", FORWARD, "all_reduce", "b·s", tokens), _call("loss", FORWARD, "all_reduce", "3·b·s", 3 * tokens)]
    return [replace(call, ranks=call.ranks or tensor) for call in calls]


def _bert_calls(model: BERT, micro_batch: int) -> list[Call]:
    """Under sequence parallelism: the gradients of what a BERT has outside of its blocks, and the first token's way to the sentence head.

    Without it, these layers are the same on every tensor rank.
    """
    h, norm = model.hidden_size, norm_parameters(model)
    calls = [
        _call("token_types", BACKWARD, "all_reduce", "types·h", model.token_types * h),
        _call("masked_lm", BACKWARD, "all_reduce", "h²", h * h),
        _call("masked_lm", BACKWARD, "all_reduce", "h", h, 1 + norm),
    ]
    if model.residual == "post_norm":
        calls.append(_call("embedding_norm", BACKWARD, "all_reduce", "h", h, norm))
    if model.sentence_head:
        calls.append(_call("sentence", FORWARD, "all_reduce", "b·h", micro_batch * h))
    return calls


def block_calls(model: GPT | BERT, tensor: int, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """The collectives of one block: entering and leaving two sliced regions, shared kv heads, and gradients that are partial sums."""
    tokens = micro_batch * model.seq_length
    size = tokens * model.hidden_size

    # Forward: attention and MLP are each entered and left. Whole activations are entered without communication.
    operations = ("all_gather", "reduce_scatter") if sequence else ("all_reduce",)
    forward = [_call("", FORWARD, operation, "b·s·h", size, 2) for operation in operations]
    if tensor > model.num_kv_heads:  # k and v of one kv head are each gathered among the ranks that use it
        sharing = tensor // model.num_kv_heads
        forward += [_call("", FORWARD, "all_gather", "b·s·e", tokens * model.head_size, 2, sharing)]

    # Backward: the conjugates of the forward pass. Where whole activations are entered, the gradients of the slices are summed.
    calls = forward + [replace(call, direction=BACKWARD, operation=CONJUGATE[call.operation]) for call in forward]

    # Full recomputation repeats the forward pass inside the backward pass. Torch stops it once everything that the backward pass
    # reads is there. This omits the last reduction of a block, unless something behind it is read: a dropout mask or a norm's input.
    if recompute == "full":
        last_is_read = model.residual == "post_norm" or model.residual_dropout > 0
        last = operations[-1]
        for call in forward:
            calls.append(replace(call, direction=BACKWARD, times=call.times - (call.operation == last and not last_is_read)))

    # Parameters that every rank holds whole but uses on its own part of the activations: both norms, both row biases, head norms.
    if sequence:
        calls.append(_call("", BACKWARD, "all_reduce", "h", model.hidden_size, 2 * norm_parameters(model) + model.output_bias + model.bias))
    if model.qk_norm:
        calls.append(_call("", BACKWARD, "all_reduce", "e", model.head_size, 2 * norm_parameters(model)))
    return calls


def norm_parameters(model: GPT | BERT) -> int:
    """The number of parameter tensors of a norm: a weight, and a bias for a layernorm of a model with biases."""
    return 2 if model.norm == "layernorm" and model.bias else 1


def _call(layer: str, direction: str, operation: str, formula: str, elements: int, times: int = 1, ranks: int = 0) -> Call:
    """A collective on the tensor axis; ranks = 0 stands for all tensor ranks."""
    return Call("tensor", layer, direction, operation, formula, elements, times, ranks)
