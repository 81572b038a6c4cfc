"""Communication of tensor parallelism in closed form: every collective of a micro-batch, by layer. Imports no torch.

arXiv:1909.08053 (§3) counts four all-reduces of b·s·h per block. Under sequence parallelism (arXiv:2205.05198, §4.2) each of them
is replaced by an all-gather and a reduce-scatter. A class of a variant.py may communicate anything, so a model that names one has
no closed form.
"""

from dataclasses import replace

from models.config import GPT, has_variants
from models.encoder_config import BERT, T5, AnyModel
from parallel.traffic import Call

FORWARD, BACKWARD = "forward", "backward"
CONJUGATE = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_reduce": "all_reduce"}
"""The collective of the forward pass -> that of its backward pass."""


def has_closed_form(model: AnyModel) -> bool:
    """Whether the model's communication and parameters can be computed from its settings: not with classes of a variant.py."""
    return not has_variants(model)


def tensor_calls(model: AnyModel, tensor: int, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """All collectives on the tensor axis in one micro-batch's forward and backward pass, loss included."""
    if tensor == 1:
        return []
    if isinstance(model, T5):
        return [replace(call, ranks=tensor) for call in _t5_calls(model, sequence, recompute, micro_batch)]
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


def _t5_calls(model: T5, sequence: bool, recompute: str, micro_batch: int) -> list[Call]:
    """The collectives of a T5: S = source_length rows of the encoder and T = seq_length rows of the decoder are cut each by itself."""
    source, target = (micro_batch * length * model.hidden_size for length in (model.source_length, model.seq_length))
    if sequence:
        calls = [_call("embedding", direction, operation, "b·(S+T)·h", source + target)
                 for direction, operation in ((FORWARD, "reduce_scatter"), (BACKWARD, "all_gather"))]  # fmt: skip
    else:
        calls = [_call("embedding", FORWARD, "all_reduce", "b·(S+T)·h", source + target)]

    # A block of the encoder enters and leaves two sliced regions. One of the decoder enters and leaves three, and its cross attention
    # enters with the encoder's rows as well. Each region has a norm in front of it.
    of_source, of_target = ("b·S·h", source), ("b·T·h", target)
    encoder = _t5_block_calls([of_source] * 2, [of_source] * 2, sequence, recompute, model)
    decoder = _t5_block_calls([*[of_target] * 3, of_source], [of_target] * 3, sequence, recompute, model)
    for stack, number, block in (("encoder", model.num_encoder_layers, encoder), ("decoder", model.num_layers, decoder)):
        calls += [replace(call, layer=f"{stack}.blocks.{i}") for i in range(number) for call in block]
        if sequence:
            calls.append(_call(f"{stack}.final_norm", BACKWARD, "all_reduce", "h", model.hidden_size))

    if sequence:
        calls += [_call("head", FORWARD, "all_gather", *of_target), _call("head", BACKWARD, "reduce_scatter", *of_target)]
    else:
        calls.append(_call("head", BACKWARD, "all_reduce", *of_target))
    tokens = micro_batch * model.seq_length
    return [*calls, _call("loss", FORWARD, "all_reduce", "b·T", tokens), _call("loss", FORWARD, "all_reduce", "3·b·T", 3 * tokens)]


def _t5_block_calls(entered: list[tuple[str, int]], left: list[tuple[str, int]], sequence: bool, recompute: str, model: T5) -> list[Call]:
    """The collectives of a block that enters sliced regions with tensors (formula, elements), and leaves them with others."""
    operations = ("all_gather", "reduce_scatter") if sequence else ("", "all_reduce")
    forward = [_call("", FORWARD, operations[0], *size) for size in entered if sequence]
    forward += [_call("", FORWARD, operations[1], *size) for size in left]
    backward = [_call("", BACKWARD, CONJUGATE[operations[0]] if sequence else "all_reduce", *size) for size in entered]
    backward += [_call("", BACKWARD, CONJUGATE[operations[1]], *size) for size in left if sequence]
    if recompute == "full":  # as in block_calls; the last reduction of the block is the last of the list
        again = forward if model.residual_dropout > 0 else forward[:-1]
        backward += [replace(call, direction=BACKWARD) for call in again]
    if sequence:
        backward.append(_call("", BACKWARD, "all_reduce", "h", model.hidden_size, len(left)))
    return forward + backward


def norm_parameters(model: GPT | BERT) -> int:
    """The number of parameter tensors of a norm: a weight, and a bias for a layernorm of a model with biases."""
    return 2 if model.norm == "layernorm" and model.bias else 1


def _call(layer: str, direction: str, operation: str, formula: str, elements: int, times: int = 1, ranks: int = 0) -> Call:
    """A collective on the tensor axis; ranks = 0 stands for all tensor ranks."""
    return Call("tensor", layer, direction, operation, formula, elements, times, ranks)
