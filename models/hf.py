"""Names and shapes to and from transformers' GPT-2, GPT-NeoX (Pythia) and Llama. Pure maps: no files, no transformers.

A family is a table: our module -> theirs, wrapped in the form in which they hold it. Tensors are whole, as checkpoints hold
them; a layout cuts them with each parameter's Slice. They may share memory with what was passed in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from models.config import GPT
from models.hf_settings import GATED_MLPS, PLAIN_MLPS, settings
from parallel.errors import Mistake

__all__ = ["FAMILIES", "from_hf", "settings", "shapes", "to_hf"]

BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""Ends of names that older files hold beside the weights: masks and rotary tables."""


@dataclass(frozen=True)
class Same:
    """Their module `name` holds what ours does: a weight '[out, in]' or a table."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Their modules that make up one of ours."""
        return (self.name,)

    def to_ours(self, tensors: list[Tensor], model: GPT) -> Tensor:
        """Their tensors, in the order of `names`, as our one."""
        return tensors[0]

    def to_theirs(self, tensor: Tensor, model: GPT) -> list[Tensor]:
        """Our tensor as theirs, in the order of `names`."""
        return [tensor]


class Transposed(Same):
    """GPT-2's Conv1D: a weight '[in, out]'."""

    def to_ours(self, tensors: list[Tensor], model: GPT) -> Tensor:
        """'[in, out]' -> '[out, in]'; a bias as it is."""
        return tensors[0].t().contiguous()

    def to_theirs(self, tensor: Tensor, model: GPT) -> list[Tensor]:
        """'[out, in]' -> '[in, out]'; a bias as it is."""
        return [tensor.t().contiguous()]


class HeadByHead(Same):
    """GPT-NeoX's qkv, whose rows are each head's q, k and v, then the next head's."""

    def to_ours(self, tensors: list[Tensor], model: GPT) -> Tensor:
        """Rows '(h 3 e)' -> '(3 h e)', of weight and bias."""
        return rearrange(tensors[0], "(h three e) ... -> (three h e) ...", three=3, h=model.num_heads)

    def to_theirs(self, tensor: Tensor, model: GPT) -> list[Tensor]:
        """Rows '(3 h e)' -> '(h 3 e)', of weight and bias."""
        return [rearrange(tensor, "(three h e) ... -> (h three e) ...", three=3, h=model.num_heads)]


@dataclass(frozen=True)
class Fused:
    """Several modules of theirs are one of ours, row under row; `rows` gives the height of each."""

    names: tuple[str, ...]
    rows: Callable[[GPT], list[int]]

    def to_ours(self, tensors: list[Tensor], model: GPT) -> Tensor:
        """q, k, v or gate, up -> one tensor."""
        heights = [len(tensor) for tensor in tensors]
        if heights != self.rows(model):  # a right sum of wrong heights would go unnoticed
            raise Mistake(f"{', '.join(self.names)} have {heights} rows where this model has {self.rows(model)}")
        return torch.cat(tensors)

    def to_theirs(self, tensor: Tensor, model: GPT) -> list[Tensor]:
        """One tensor -> q, k, v or gate, up."""
        return [part.contiguous() for part in tensor.split(self.rows(model))]


def qkv_rows(model: GPT) -> list[int]:
    """Heights of q, k and v."""
    return [model.num_heads * model.head_size] + [model.num_kv_heads * model.head_size] * 2


@dataclass(frozen=True)
class Family:
    """How transformers holds one kind of model. Names as in its files; `*` is the block's number."""

    prefix: str
    """Begins all names but the head's; some files leave it out."""
    heads: tuple[str, ...]
    """The untied head's names, the one in files first. Never prefixed."""
    modules: dict[str, Same | Fused]
    holds: dict[str, tuple]
    """Our setting -> the values that the family can express."""
    grouped: bool


FAMILIES = {
    "gpt2": Family(
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
               "mlp": tuple(PLAIN_MLPS.values()), "qk_norm": (False,)},
        grouped=False,
    ),
    "gpt_neox": Family(
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
        holds={"norm": ("layernorm",), "position": ("rotary",), "residual": ("parallel", "pre_norm"), "bias": (True,), "qkv_bias": (True,),
               "mlp": tuple(PLAIN_MLPS.values()), "qk_norm": (False,)},
        grouped=False,
    ),
    "llama": Family(
        prefix="model.",
        heads=("lm_head",),
        modules={
            "embedding": Same("embed_tokens"),
            "blocks.*.attention_norm": Same("layers.*.input_layernorm"),
            "blocks.*.attention.qkv": Fused(tuple(f"layers.*.self_attn.{part}_proj" for part in "qkv"), qkv_rows),
            "blocks.*.attention.output": Same("layers.*.self_attn.o_proj"),
            "blocks.*.mlp_norm": Same("layers.*.post_attention_layernorm"),
            "blocks.*.mlp.up": Fused(("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"), lambda model: [model.ffn_size] * 2),
            "blocks.*.mlp.down": Same("layers.*.mlp.down_proj"),
            "final_norm": Same("norm"),
        },
        holds={"norm": ("rmsnorm",), "position": ("rotary",), "rotary_fraction": (1.0,), "residual": ("pre_norm",),
               "mlp": tuple(GATED_MLPS.values()), "qk_norm": (False,)},
        grouped=True,
    ),
}  # fmt: skip
"""transformers' `model_type` -> the family."""


def from_hf(model: GPT, family: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our logical names: every parameter of `model`, whole. A missing, left over or misshapen one is a Mistake."""
    table = _table(model, family)
    theirs = {key.removeprefix(_family(family).prefix): tensor for key, tensor in state_dict.items() if not key.endswith(BUFFERS)}
    head = _take_head(_family(family), theirs)
    found = {}
    for name, shape in shapes(model).items():
        form, keys = table(name)
        if name == "head.weight" and head is not None:
            theirs[keys[0]] = head
        missing = [key for key in keys if key not in theirs]
        if missing:
            raise Mistake(f"the weights hold no {missing[0]}, which {name} is made of → is this a {family} of {model.num_layers} layers?")
        found[name] = form.to_ours([theirs.pop(key) for key in keys], model)
        if tuple(found[name].shape) != shape:
            raise Mistake(f"{keys[0]} makes {name} {list(found[name].shape)}, this model's is {list(shape)}")
    if model.tied and head is not None and not torch.equal(head, found["embedding.weight"]):
        raise Mistake("model.tied = True, but the head's weights are not the embedding's → set model.tied = False")
    if theirs:
        raise Mistake(f"the weights hold {len(theirs)} tensors that this model lacks, the first is {next(iter(theirs))}")
    return found


def to_hf(model: GPT, family: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole tensors by the names in transformers' files (a tied head is not written twice): the inverse of `from_hf`."""
    table, prefix, found = _table(model, family), _family(family).prefix, {}
    for name in shapes(model):
        form, keys = table(name)
        for key, tensor in zip(keys, form.to_theirs(weights[name], model), strict=True):
            found[key if name == "head.weight" else prefix + key] = tensor
    return found


def shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    """Logical name -> whole shape of every parameter, in the order of the layers. Without building or drawing anything."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape, bias in _modules(model):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]
    return found


def _modules(model: GPT) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, its weight's shape, whether it has a bias) of each module with parameters, as the three families have them."""
    d, f, table = model.hidden_size, model.ffn_size, (model.vocab_size, model.hidden_size)
    norm_bias, gates = model.norm == "layernorm" and model.bias, 2 if model.mlp in GATED_MLPS.values() else 1
    yield "embedding", table, False
    if model.position == "learned":
        yield "position", (model.seq_length, d), False
    for block in (f"blocks.{i}" for i in range(model.num_layers)):
        yield f"{block}.attention_norm", (d,), norm_bias
        yield f"{block}.attention.qkv", (sum(qkv_rows(model)), d), model.qkv_bias
        yield f"{block}.attention.output", (d, d), model.bias
        yield f"{block}.mlp_norm", (d,), norm_bias
        yield f"{block}.mlp.up", (gates * f, d), model.bias
        yield f"{block}.mlp.down", (d, f), model.bias
    yield "final_norm", (d,), norm_bias
    if not model.tied:
        yield "head", table, False


def _table(model: GPT, family: str) -> Callable[[str], tuple[Same | Fused, list[str]]]:
    """Our parameter -> the form they hold it in, and their names for it without the prefix."""
    _refuse_unlike(model, family)
    modules = _family(family).modules | {"head": Same(_family(family).heads[0])}

    def look_up(name: str) -> tuple[Same | Fused, list[str]]:
        module, _, kind = name.rpartition(".")
        number = module.split(".")[1] if module.startswith("blocks.") else ""
        form = modules[module.replace(f".{number}.", ".*.") if number else module]
        return form, [f"{theirs.replace('*', number)}.{kind}" for theirs in form.names]

    return look_up


def _take_head(family: Family, theirs: dict[str, Tensor]) -> Tensor | None:
    found = [theirs.pop(f"{head}.weight") for head in family.heads if f"{head}.weight" in theirs]
    return found[0] if found else None


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise Mistake(f"model_type = {name!r} is not a family we can read or write → use {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse_unlike(model: GPT, family: str) -> None:
    for field, values in _family(family).holds.items():
        if getattr(model, field) not in values:
            allowed = " or ".join(repr(value) for value in dict.fromkeys(values))
            raise Mistake(f"model.{field} = {getattr(model, field)!r} is no {family} → that has {allowed}")
    if not _family(family).grouped and model.num_kv_heads != model.num_heads:
        raise Mistake(f"model.num_kv_heads = {model.num_kv_heads} is no {family} → that has as many as num_heads = {model.num_heads}")
    if model.bias != model.qkv_bias:  # reached by Llama alone
        raise Mistake(f"model.bias = {model.bias} with model.qkv_bias = {model.qkv_bias} is no {family} → that has both or neither")
