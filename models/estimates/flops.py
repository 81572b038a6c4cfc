"""Floating-point operations of a model in closed form, computed from its settings alone. Imports no torch.

Only matrix products are counted, a multiplication and an addition as two operations, as in arXiv:2104.04473, section 5.1. These are *model*
FLOPs: recomputation, padding of the vocabulary and what an implementation wastes do not count. Attention counts as all s² pairs, although
half of a GPT's are masked. A BERT's sentence head is left out: its h² + 2h products per sample are less than those of one token. A class
of a variant.py may compute anything, so a model that names one has no closed form: None.
"""

from models.encoder_config import BERT, T5, AnyModel
from models.estimates.communication import has_closed_form
from models.estimates.parameters import GATED

BACKWARD = 2
"""The backward pass costs two products for each of the forward pass: the gradients of the input and of the weight."""


def forward_flops(model: AnyModel, length: int | None = None) -> int | None:
    """Of one token of a text of `length` tokens (None: model.seq_length), logits included.

    Of a T5, whose `length` is that of the target: the mean over the tokens of a row, source and target, rounded.
    """
    if not has_closed_form(model):
        return None
    if isinstance(model, T5):
        target = length or model.seq_length
        return round(t5_row_flops(model, target) / (model.source_length + target))
    h, f, length = model.hidden_size, model.ffn_size, length or model.seq_length
    q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    projections = h * (q + 2 * kv) + q * h
    scores_and_values = 2 * length * q
    mlp = (3 if model.mlp in GATED else 2) * h * f
    head = model.vocab_size * h + (h * h if isinstance(model, BERT) else 0)  # with the transform of masked tokens
    return 2 * (model.num_layers * (projections + scores_and_values + mlp) + head)


def t5_row_flops(model: T5, target: int) -> int:
    """Forward, of a source of model.source_length tokens and a target of `target` tokens, logits included."""
    h, q, source = model.hidden_size, model.num_heads * model.head_size, model.source_length
    token = 4 * q * h + (3 if model.mlp in GATED else 2) * h * model.ffn_size  # attention's projections and the MLP
    encoder = source * token + 2 * source**2 * q
    cross = 2 * (target + source) * q * h + 2 * target * source * q  # q and output, k and v; scores and values
    decoder = target * token + 2 * target**2 * q + cross
    return 2 * (model.num_encoder_layers * encoder + model.num_layers * decoder + target * model.vocab_size * h)


def training_flops(model: AnyModel, length: int | None = None) -> int | None:
    """Of one token, forward and backward."""
    forward = forward_flops(model, length)
    return None if forward is None else (1 + BACKWARD) * forward
