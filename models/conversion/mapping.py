"""Names and shapes to and from transformers' GPT-2, GPT-NeoX (Pythia) and Llama. Pure maps: no files, no transformers.

A ParameterMapping says what one of our parameters is made of in their files, so that a model goes from one to the other a parameter at a time.
Tensors are whole, as checkpoints hold them; a layout cuts them with each parameter's Slice. They may share memory with what was
passed in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import GPT
from models.conversion.families import FAMILIES, Family, Fused, Same, qkv_rows
from models.conversion.read_config import GATED_MLPS
from parallel.errors import Mistake

__all__ = ["FAMILIES", "ParameterMapping", "Plan", "family_of", "from_hf", "links", "plan", "shapes", "to_hf"]

OTHER = " → is the configuration this model's?"
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""Ends of names that older files hold beside the weights: masks and rotary tables."""


@dataclass(frozen=True)
class ParameterMapping:
    """Our parameter `name`, whole, of `shape`: their tensors `keys` in the form `form`."""

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    form: Same | Fused

    def ours(self, tensors: list[Tensor], model: GPT) -> Tensor:
        """Their tensors, in the order of `keys`, as our one. A Mistake where they do not make it."""
        try:
            found = self.form.to_ours(tensors, model)
        except Mistake:
            raise
        except Exception as error:  # einops and torch each have their own way to say that sizes do not fit
            told = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise Mistake(f"{self.keys[0]} {told:.100} does not make {self.name} {list(self.shape)}{OTHER}") from error
        if tuple(found.shape) != self.shape:
            raise Mistake(f"{self.keys[0]} makes {self.name} {list(found.shape)}, this model's is {list(self.shape)}{OTHER}")
        return found

    def theirs(self, tensor: Tensor, model: GPT) -> dict[str, Tensor]:
        """Our tensor as theirs, by key."""
        return dict(zip(self.keys, self.form.to_theirs(tensor, model), strict=True))

    def their_shapes(self, model: GPT) -> dict[str, tuple[int, ...]]:
        """The shape of each of their tensors."""
        return {key: tuple(tensor.shape) for key, tensor in self.theirs(torch.empty(self.shape, device="meta"), model).items()}


@dataclass(frozen=True)
class Plan:
    """How a model is read: a link for each parameter, in the order of the layers, their keys as in the files."""

    links: list[ParameterMapping]
    copy: str | None
    """The key of a tied head that the files hold all the same; it must be equal to the embedding's tensor."""


def plan(model: GPT, family: Family, found: Mapping[str, tuple[int, ...]]) -> Plan:
    """How `model` is read from tensors of these names and shapes, which are all of them.

    A missing, misshapen, doubled or left over one is a Mistake; no tensor need be read to know.
    """
    if model.num_layers > len(found):
        raise Mistake(f"the weights hold {len(found)} tensors, too few for a {family.name} of {model.num_layers} layers{OTHER}")
    keys = _without_prefix(family, found)
    head = _take_head(family, keys)
    planned = []
    for link in links(model, family):
        bare = [key.removeprefix(family.prefix) for key in link.keys]
        if link.name == "head.weight":
            keys |= {bare[0]: head} if head else {}
        missing = [key for key in bare if key not in keys]
        if missing:
            what = f"the weights hold no {missing[0]}, which {link.name} is made of"
            raise Mistake(f"{what} → is this a {family.name} of {model.num_layers} layers?")
        planned.append(ParameterMapping(link.name, link.shape, tuple(keys.pop(key) for key in bare), link.form))
        planned[-1].ours([torch.empty(found[key], device="meta") for key in planned[-1].keys], model)
    if keys:
        raise Mistake(f"the weights hold {len(keys)} tensors that this model lacks, the first is {next(iter(keys))}{OTHER}")
    return Plan(planned, head if model.tied else None)


def from_hf(model: GPT, family: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by our logical names: every parameter of `model`, whole. One that does not fit is a Mistake, as in `plan`."""
    planned = plan(model, _family(family), {key: tuple(tensor.shape) for key, tensor in state_dict.items()})
    found = {link.name: link.ours([state_dict[key] for key in link.keys], model) for link in planned.links}
    if planned.copy:
        check_copy(state_dict[planned.copy], found["embedding.weight"])
    return found


def check_copy(head: Tensor, embedding: Tensor) -> None:
    """A Mistake where a tied model's files hold a head that is not the embedding."""
    if not torch.equal(head, embedding):
        raise Mistake("model.tied = True, but the head's weights are not the embedding's → set tie_word_embeddings to false")


def to_hf(model: GPT, family: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole tensors by the names in transformers' files (a tied head is not written twice): the inverse of `from_hf`."""
    found: dict[str, Tensor] = {}
    for link in links(model, _family(family)):
        found |= link.theirs(weights[link.name], model)
    return found


def links(model: GPT, family: Family) -> list[ParameterMapping]:
    """A link for each parameter, in the order of the layers, their keys as transformers writes them."""
    if misfits := unlike(model, family):
        raise Mistake(misfits[0])
    look_up = _names(family)
    return [ParameterMapping(name, shape, keys, form) for name, shape in shapes(model).items() for form, keys in [look_up(name)]]


def family_of(model: GPT) -> str:
    """The family that holds the model; a Mistake lists every setting without a counterpart in the nearest one."""
    misfits = {name: unlike(model, family) for name, family in FAMILIES.items()}
    name = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[name]:
        settings = "; ".join(misfits[name])
        raise Mistake(f"no family of transformers that we write ({', '.join(FAMILIES)}) is this model: {settings} → train one that fits")
    return name


def unlike(model: GPT, family: Family) -> list[str]:
    """Each setting that the family cannot hold, in words."""
    found = []
    for field, values in family.holds.items():
        if getattr(model, field) not in values:
            allowed = " or ".join(repr(value) for value in dict.fromkeys(values))
            found.append(f"model.{field} = {getattr(model, field)!r} is no {family.name} → that has {allowed}")
    if not family.grouped and model.num_kv_heads != model.num_heads:
        has = f"that has as many as num_heads = {model.num_heads}"
        found.append(f"model.num_kv_heads = {model.num_kv_heads} is no {family.name} → {has}")
    if "bias" not in family.holds and model.bias != model.qkv_bias:
        told = f"model.bias = {model.bias} with model.qkv_bias = {model.qkv_bias}"
        found.append(f"{told} is no {family.name} → that has both or neither")
    if model.position == "rotary" and int(model.head_size * (model.rotary_fraction or 0)) % 2:
        what = f"model.rotary_fraction = {model.rotary_fraction} of {model.head_size} features, an odd number,"
        found.append(f"{what} is no {family.name} → that turns an even number of them")
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


def _names(family: Family) -> Callable[[str], tuple[Same | Fused, tuple[str, ...]]]:
    """Our parameter -> the form they hold it in, and the names of its tensors."""
    modules = family.modules | {"head": Same(family.heads[0])}

    def look_up(name: str) -> tuple[Same | Fused, tuple[str, ...]]:
        module, _, kind = name.rpartition(".")
        number = module.split(".")[1] if module.startswith("blocks.") else ""
        form = modules[module.replace(f".{number}.", ".*.") if number else module]
        prefix = "" if module == "head" else family.prefix
        return form, tuple(f"{prefix}{theirs.replace('*', number)}.{kind}" for theirs in form.names)

    return look_up


def _without_prefix(family: Family, found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name without the prefix -> name in the files, of everything that is a weight."""
    keys: dict[str, str] = {}
    for key in found:
        bare = key.removeprefix(family.prefix)
        if bare in keys:
            raise Mistake(f"the weights hold both {keys[bare]} and {key}, which are the same → take one of them out")
        if not key.endswith(BUFFERS):
            keys[bare] = key
    return keys


def _take_head(family: Family, keys: dict[str, str]) -> str | None:
    found = [keys.pop(f"{head}.weight") for head in family.heads if f"{head}.weight" in keys]
    if len(found) > 1:
        raise Mistake(f"the weights hold both {found[0]} and {found[1]}, which are the same → take one of them out")
    return found[0] if found else None


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise Mistake(f"model_type = {name!r} is not a family we can read or write → use {', '.join(FAMILIES)}")
    return FAMILIES[name]
