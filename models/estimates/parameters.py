"""Parameter counts of a model in closed form: exact integers computed from its settings alone. Imports no torch.

A class of a variant.py may have any number of parameters, so a model that names one has no closed form: None.
"""

import math

from models.encoder_config import BERT, T5, AnyModel
from models.estimates.communication import has_closed_form, norm_parameters

GATED = ("swiglu", "geglu", "geglu_tanh")
"""The MLPs with a gate projection beside up."""


def parameters(model: AnyModel) -> int | None:
    """Unique parameters: a tied head counts once, padding of the vocabulary not at all."""
    if not has_closed_form(model):
        return None
    sliced, replicated = _sliced_and_replicated(model, model.vocab_size)
    return sliced + replicated


def parameters_on_rank(model: AnyModel, tensor: int) -> int | None:
    """What each of `tensor` tensor ranks holds of the whole model (pipe = 1), padded vocabulary rows included."""
    if not has_closed_form(model):
        return None
    sliced, replicated = _sliced_and_replicated(model, tensor * math.ceil(model.vocab_size / tensor))
    return sliced // tensor + replicated


def _sliced_and_replicated(model: AnyModel, vocab_rows: int) -> tuple[int, int]:
    """(parameters that are cut over tensor ranks, parameters that every tensor rank holds whole) of the whole model."""
    if isinstance(model, T5):
        return _t5_sliced_and_replicated(model, vocab_rows)
    h, f = model.hidden_size, model.ffn_size
    norm, head_norm = h * norm_parameters(model), model.head_size * norm_parameters(model)

    # Attention: qkv h (q + 2 kv), output q h, cut by heads. The bias of the output and the norms of one head are held whole.
    q_rows = model.num_heads * model.head_size
    qkv_rows = q_rows + 2 * model.num_kv_heads * model.head_size
    attention_sliced = qkv_rows * (h + model.qkv_bias) + h * q_rows
    attention_replicated = h * model.output_bias + (2 * head_norm if model.qk_norm else 0)

    # MLP: up (and gate) h f each, down f h, cut over f. The bias of down is held whole.
    up_rows = f * (2 if model.mlp in GATED else 1)
    mlp_sliced = up_rows * (h + model.bias) + f * h
    mlp_replicated = h * model.bias

    # The model: blocks with two norms each, one or two vocabulary tables, learned positions, a final norm.
    tables = 1 if model.tied else 2
    positions = model.seq_length * h if model.position == "learned" else 0
    final_norm = 0 if model.residual == "post_norm" else norm  # a post-norm block ends with its own
    sliced = tables * vocab_rows * h + model.num_layers * (attention_sliced + mlp_sliced)
    replicated = positions + final_norm + model.num_layers * (2 * norm + attention_replicated + mlp_replicated)
    if isinstance(model, BERT):
        sliced += vocab_rows  # the bias of the logits
        replicated += _bert_replicated(model, norm)
    return sliced, replicated


def _bert_replicated(model: BERT, norm: int) -> int:
    """What a BERT has beside the embedding and the blocks: every tensor rank holds it whole. `norm`: the parameters of one norm."""
    h = model.hidden_size
    embedding_norm = norm if model.residual == "post_norm" else 0
    masked_lm = h * h + h + norm
    sentence = (h * h + h) + 2 * (h + 1) if model.sentence_head else 0  # a pooler and a classifier
    return model.token_types * h + embedding_norm + masked_lm + sentence


def _t5_sliced_and_replicated(model: T5, vocab_rows: int) -> tuple[int, int]:
    """The same of a T5: norms alone are held whole, two in a block of the encoder, three in one of the decoder, one behind each stack."""
    h, q_rows = model.hidden_size, model.num_heads * model.head_size
    attention, table = 4 * q_rows * h, model.relative_buckets * model.num_heads
    mlp = (3 if model.mlp in GATED else 2) * model.ffn_size * h
    tables = 1 if model.tied else 2
    encoder, decoder = attention + table + mlp, 2 * attention + table + mlp
    sliced = tables * vocab_rows * h + model.num_encoder_layers * encoder + model.num_layers * decoder
    return sliced, (2 * model.num_encoder_layers + 3 * model.num_layers + 2) * h
