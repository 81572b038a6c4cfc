"""transformers' BERTs with random weights, and their weights by our names, written out apart from models/conversion/."""

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, MegatronBertConfig, MegatronBertForPreTraining, PreTrainedModel

from tests.models.helpers.bert import LENGTH, VOCAB

CLASSES = {"post_norm": (BertConfig, BertForPreTraining), "pre_norm": (MegatronBertConfig, MegatronBertForPreTraining)}
"""Our residual -> their classes."""
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=LENGTH,
    type_vocab_size=2, layer_norm_eps=1e-12,
)  # fmt: skip
"""Their words for tests.models.helpers.bert.SHAPE."""
OF_A_BLOCK = {
    "post_norm": {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"},
    "pre_norm": {"attention_norm": "attention.ln", "mlp_norm": "ln"},
}
OUTSIDE = {
    "embedding.weight": "bert.embeddings.word_embeddings.weight",
    "token_types.weight": "bert.embeddings.token_type_embeddings.weight",
    "position.weight": "bert.embeddings.position_embeddings.weight",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "final_norm": "bert.encoder.ln",
    "sentence.pooler": "bert.pooler.dense",
    "sentence.classifier": "cls.seq_relationship",
    "masked_lm.dense": "cls.predictions.transform.dense",
    "masked_lm.norm": "cls.predictions.transform.LayerNorm",
    "head_bias.bias": "cls.predictions.bias",
}


def their_model(residual: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Norms around one and biases far from zero: a freshly initialised model would hide a lost bias."""
    config, make = CLASSES[residual]
    model = make(config(**SIZES, attn_implementation="eager")).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=g) / parameter.dim())
    return model.to(dtype)


def by_our_names(residual: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their parameters, or gradients, each once."""
    found = {}
    for ours, name in OUTSIDE.items():
        for part in ("",) if ours.endswith(("weight", "bias")) else (".weight", ".bias"):
            if name + part in theirs:
                found[ours + part] = theirs[name + part]
    names = {"attention.output": "attention.output.dense", "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    for block in range(SIZES["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{block}"
        for part in ("weight", "bias"):
            for ours, name in {**names, **OF_A_BLOCK[residual]}.items():
                found[f"blocks.{block}.{ours}.{part}"] = theirs[f"{prefix}.{name}.{part}"]
            qkv = [theirs[f"{prefix}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            found[f"blocks.{block}.attention.qkv.{part}"] = torch.cat(qkv)
    assert sum(tensor.numel() for tensor in found.values()) == sum(tensor.numel() for tensor in theirs.values())
    return found
