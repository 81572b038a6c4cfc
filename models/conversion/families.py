"""How transformers stores the models of ten families, from GPT-2 to UMT5: for each a table from our modules to theirs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from models.conversion.read_config import FEED_FORWARDS, GATED_MLPS, PLAIN_MLPS
from models.encoder_config import AnyModel
from parallel.errors import Mistake


@dataclass(frozen=True)
class Same:
    """Their module `name` stores the same tensor as ours: a weight '[out, in]' or a table."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Their modules that make up our one."""
        return (self.name,)

    def to_ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """Their tensors, in the order of `names` -> our tensor."""
        return tensors[0]

    def to_theirs(self, tensor: Tensor, model: AnyModel) -> list[Tensor]:
        """Our tensor -> their tensors, in the order of `names`."""
        return [tensor]


class Transposed(Same):
    """GPT-2's Conv1D: a weight '[in, out]'."""

    def to_ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """'[in, out]' -> '[out, in]'; a bias is unchanged."""
        return tensors[0].t().contiguous()

    def to_theirs(self, tensor: Tensor, model: AnyModel) -> list[Tensor]:
        """'[out, in]' -> '[in, out]'; a bias is unchanged."""
        return [tensor.t().contiguous()]


class HeadByHead(Same):
    """GPT-NeoX's qkv: the rows of the first head's q, k and v, then those of the next head, and so on."""

    def to_ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """Rows '(h 3 e)' -> '(3 h e)' of a weight or a bias."""
        return rearrange(tensors[0], "(h three e) ... -> (three h e) ...", three=3, h=model.num_heads)

    def to_theirs(self, tensor: Tensor, model: AnyModel) -> list[Tensor]:
        """Rows '(3 h e)' -> '(h 3 e)' of a weight or a bias."""
        return [rearrange(tensor, "(three h e) ... -> (h three e) ...", three=3, h=model.num_heads)]


@dataclass(frozen=True)
class Fused:
    """Several of their modules are concatenated by rows to one of ours; `rows` gives the number of rows of each."""

    names: tuple[str, ...]
    rows: Callable[[AnyModel], list[int]]

    def to_ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """q, k, v or gate, up -> one tensor."""
        heights = [len(tensor) for tensor in tensors]
        if heights != self.rows(model):  # wrong numbers of rows with the right sum would otherwise go unnoticed
            raise Mistake(
                f"{', '.join(self.names)} have {heights} rows where this model has {self.rows(model)} → is the configuration this model's?"
            )
        return torch.cat(tensors)

    def to_theirs(self, tensor: Tensor, model: AnyModel) -> list[Tensor]:
        """One tensor -> q, k, v or gate, up."""
        return [part.contiguous() for part in tensor.split(self.rows(model))]


def qkv_rows(model: AnyModel) -> list[int]:
    """The number of rows of q, k and v."""
    return [model.num_heads * model.head_size] + [model.num_kv_heads * model.head_size] * 2


@dataclass(frozen=True)
class Family:
    """How transformers stores one kind of model. Names are those of its files; `*` stands for the number of the block."""

    name: str
    prefix: str
    """The prefix of all names but the head's. Some files leave it out."""
    heads: tuple[str, ...]
    """The names of an untied head, the one used in files first. Never prefixed."""
    modules: dict[str, Same | Fused]
    holds: dict[str, tuple]
    """Our setting -> the values that the family can express."""
    grouped: bool
    """Whether it can have fewer kv heads than query heads."""
    equal: tuple[tuple[str, str], ...] = ()
    """Pairs of our settings for which the family has one setting."""
    free_head_size: bool = False
    """Whether head_size may be other than hidden_size / num_heads."""
    free_hidden_size: bool = False
    """Whether num_heads need not divide hidden_size."""
    kind: str = "gpt"
    """The `kind` of the models that it can express."""
    unprefixed: tuple[str, ...] = ()
    """Beginnings of names that have no prefix, besides the heads'."""
    copies: dict[str, str] = field(default_factory=dict)
    """The name of a tensor that files may hold as a copy -> the name of the tensor that it is equal to."""
    ungated: dict[str, "Same"] = field(default_factory=dict)
    """What stands in the place of modules if the MLP has no gate."""


LLAMA_MODULES: dict[str, Same | Fused] = {
    "embedding": Same("embed_tokens"),
    "blocks.*.attention_norm": Same("layers.*.input_layernorm"),
    "blocks.*.attention.qkv": Fused(tuple(f"layers.*.self_attn.{part}_proj" for part in "qkv"), qkv_rows),
    "blocks.*.attention.output": Same("layers.*.self_attn.o_proj"),
    "blocks.*.mlp_norm": Same("layers.*.post_attention_layernorm"),
    "blocks.*.mlp.up": Fused(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), lambda model: [model.ffn_size] * 2),
    "blocks.*.mlp.down": Same("layers.*.mlp.down_proj"),
    "final_norm": Same("norm"),
}
"""The names that Llama, Mistral, Qwen2 and Qwen3 share."""
QK_NORMS: dict[str, Same | Fused] = {f"blocks.*.attention.{part}_norm": Same(f"layers.*.self_attn.{part}_norm") for part in "qk"}
LLAMA_HOLDS: dict[str, tuple] = {
    "norm": ("rmsnorm",), "position": ("rotary",), "rotary_fraction": (1.0,), "residual": ("pre_norm",),
    "mlp": tuple(GATED_MLPS.values()),
}  # fmt: skip

BERT_HEADS = "cls."
"""How the names of a BERT's heads begin, the pooler's excepted. A plain encoder has no such names."""
BERT_MODULES: dict[str, Same | Fused] = {
    "embedding": Same("embeddings.word_embeddings"),
    "token_types": Same("embeddings.token_type_embeddings"),
    "position": Same("embeddings.position_embeddings"),
    "blocks.*.attention.qkv": Fused(tuple(f"encoder.layer.*.attention.self.{part}" for part in ("query", "key", "value")), qkv_rows),
    "blocks.*.attention.output": Same("encoder.layer.*.attention.output.dense"),
    "blocks.*.mlp.up": Same("encoder.layer.*.intermediate.dense"),
    "blocks.*.mlp.down": Same("encoder.layer.*.output.dense"),
    "sentence.pooler": Same("pooler.dense"),
    "sentence.classifier": Same("cls.seq_relationship"),
    "masked_lm.dense": Same("cls.predictions.transform.dense"),
    "masked_lm.norm": Same("cls.predictions.transform.LayerNorm"),
    "head_bias": Same("cls.predictions"),
}
"""The names that BERT and MegatronBERT share: all but those of norms."""
POST_NORMS: dict[str, Same | Fused] = {
    "embedding_norm": Same("embeddings.LayerNorm"),
    "blocks.*.attention_norm": Same("encoder.layer.*.attention.output.LayerNorm"),
    "blocks.*.mlp_norm": Same("encoder.layer.*.output.LayerNorm"),
}
PRE_NORMS: dict[str, Same | Fused] = {
    "blocks.*.attention_norm": Same("encoder.layer.*.attention.ln"),
    "blocks.*.mlp_norm": Same("encoder.layer.*.ln"),
    "final_norm": Same("encoder.ln"),
}


def _bert(name: str, residual: str, norms: dict[str, Same | Fused]) -> Family:
    return Family(
        name=name,
        prefix="bert.",
        heads=("cls.predictions.decoder",),
        modules=BERT_MODULES | norms,
        holds={"attention": ("bidirectional",), "residual": (residual,), "mlp": ("gelu",)},
        grouped=False,
        kind="bert",
        unprefixed=(BERT_HEADS,),
        copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    )


T5_BLOCKS = {"encoder": ("SelfAttention", "DenseReluDense"), "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense")}
"""The parts of a block of each stack, in the order of their `layer`s, each with a norm in front of it."""


def _t5(name: str, table: str) -> Family:
    """`table`: the number of the block that holds the table of relative positions of a block, `*` for each its own."""
    modules: dict[str, Same | Fused] = {"embedding": Same("shared")}
    ungated = {}
    for stack, parts in T5_BLOCKS.items():
        ours, theirs = f"{stack}.blocks.*", f"{stack}.block.*.layer"
        own, mlp = f"{theirs}.0.SelfAttention", f"{theirs}.{len(parts) - 1}.DenseReluDense"
        modules |= {
            f"{ours}.attention_norm": Same(f"{theirs}.0.layer_norm"),
            f"{ours}.attention.qkv": Fused(tuple(f"{own}.{part}" for part in "qkv"), qkv_rows),
            f"{ours}.attention.output": Same(f"{own}.o"),
            f"{ours}.attention.position": Same(f"{stack}.block.{table}.layer.0.SelfAttention.relative_attention_bias"),
            f"{ours}.mlp_norm": Same(f"{theirs}.{len(parts) - 1}.layer_norm"),
            f"{ours}.mlp.up": Fused((f"{mlp}.wi_0", f"{mlp}.wi_1"), lambda model: [model.ffn_size] * 2),
            f"{ours}.mlp.down": Same(f"{mlp}.wo"),
            f"{stack}.final_norm": Same(f"{stack}.final_layer_norm"),
        }
        ungated[f"{ours}.mlp.up"] = Same(f"{mlp}.wi")
    cross = "decoder.block.*.layer.1"
    modules |= {
        "decoder.blocks.*.cross_norm": Same(f"{cross}.layer_norm"),
        "decoder.blocks.*.cross_attention.q": Same(f"{cross}.EncDecAttention.q"),
        "decoder.blocks.*.cross_attention.kv": Fused(tuple(f"{cross}.EncDecAttention.{part}" for part in "kv"), lambda m: qkv_rows(m)[1:]),
        "decoder.blocks.*.cross_attention.output": Same(f"{cross}.EncDecAttention.o"),
    }
    return Family(
        name=name,
        prefix="",
        heads=("lm_head",),
        modules=modules,
        holds={"mlp": tuple(FEED_FORWARDS.values())},
        grouped=False,
        free_head_size=True,
        free_hidden_size=True,
        kind="t5",
        copies={f"{stack}.embed_tokens.weight": "shared.weight" for stack in T5_BLOCKS},
        ungated=ungated,
    )


FAMILIES = {
    "gpt2": Family(
        name="gpt2",
        prefix="transformer.",
        heads=("lm_head",),
        modules={
            "embedding": Same("wte"),
            "position": Same("wpe"),
            "blocks.*.attention_norm": Same("h.*.ln_1"),
            "blocks.*.attention.qkv": Transposed("h.*.attn.c_attn"),
            "blocks.*.attention.output": Transposed("h.*.attn.c_proj"),
            "blocks.*.mlp_norm": Same("h.*.ln_2"),
            "blocks.*.mlp.up": Transposed("h.*.mlp.c_fc"),
            "blocks.*.mlp.down": Transposed("h.*.mlp.c_proj"),
            "final_norm": Same("ln_f"),
        },
        holds={"norm": ("layernorm",), "position": ("learned",), "residual": ("pre_norm",), "bias": (True,), "qkv_bias": (True,),
               "output_bias": (True,), "mlp": tuple(PLAIN_MLPS.values()), "qk_norm": (False,)},
        grouped=False,
    ),
    "gpt_neox": Family(
        name="gpt_neox",
        prefix="gpt_neox.",
        heads=("embed_out", "lm_head"),
        modules={
            "embedding": Same("embed_in"),
            "blocks.*.attention_norm": Same("layers.*.input_layernorm"),
            "blocks.*.attention.qkv": HeadByHead("layers.*.attention.query_key_value"),
            "blocks.*.attention.output": Same("layers.*.attention.dense"),
            "blocks.*.mlp_norm": Same("layers.*.post_attention_layernorm"),
            "blocks.*.mlp.up": Same("layers.*.mlp.dense_h_to_4h"),
            "blocks.*.mlp.down": Same("layers.*.mlp.dense_4h_to_h"),
            "final_norm": Same("final_layer_norm"),
        },
        holds={"norm": ("layernorm",), "position": ("rotary",), "residual": ("parallel", "pre_norm"), "bias": (True,),
               "mlp": tuple(PLAIN_MLPS.values()), "qk_norm": (False,)},
        grouped=False,
        equal=(("qkv_bias", "output_bias"),),
    ),
    "llama": Family(
        name="llama",
        prefix="model.",
        heads=("lm_head",),
        modules=LLAMA_MODULES,
        holds=LLAMA_HOLDS | {"qk_norm": (False,)},
        grouped=True,
        equal=(("qkv_bias", "output_bias"),),
        free_head_size=True,
    ),
    "mistral": Family(
        name="mistral",
        prefix="model.",
        heads=("lm_head",),
        modules=LLAMA_MODULES,
        holds=LLAMA_HOLDS | {"bias": (False,), "qkv_bias": (False,), "output_bias": (False,), "qk_norm": (False,)},
        grouped=True,
        free_head_size=True,
        free_hidden_size=True,
    ),
    "qwen2": Family(
        name="qwen2",
        prefix="model.",
        heads=("lm_head",),
        modules=LLAMA_MODULES,
        holds=LLAMA_HOLDS | {"bias": (False,), "qkv_bias": (True,), "output_bias": (False,), "qk_norm": (False,)},
        grouped=True,
        free_head_size=True,
        free_hidden_size=True,
    ),
    "qwen3": Family(
        name="qwen3",
        prefix="model.",
        heads=("lm_head",),
        modules=LLAMA_MODULES | QK_NORMS,
        holds=LLAMA_HOLDS | {"bias": (False,), "qk_norm": (True,)},
        grouped=True,
        equal=(("qkv_bias", "output_bias"),),
        free_head_size=True,
        free_hidden_size=True,
    ),
    "bert": _bert("bert", "post_norm", POST_NORMS),
    "megatron-bert": _bert("megatron-bert", "pre_norm", PRE_NORMS),
    "umt5": _t5("umt5", "*"),
    "t5": _t5("t5", "0"),  # read only: every block gets a copy of the table of its stack's first, and is written as a umt5
}  # fmt: skip
"""transformers' `model_type` -> family."""
