"""Weight conversion: parameter names and shapes from and to the families of transformers in families.py.

A ParameterMapping says which tensors of a file make up one of our parameters, so that a model is converted one parameter at a time.
Tensors are whole, as in checkpoints; a layout cuts them with each parameter's Slice. Results may share memory with the arguments.
Nothing here reads files or imports transformers.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from models.config import ATTENTIONS, GPT
from models.conversion.families import BERT_HEADS, BERT_MODULES, FAMILIES, Family, Fused, Same, qkv_rows
from models.conversion.read_config import GATED_MLPS
from models.encoder_config import BERT, T5, AnyModel
from parallel.errors import Mistake

OTHER = " → is the configuration this model's?"
"""The way out in errors about weights that do not fit the configuration."""
BUFFERS = (
    *(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
    *("rotary_emb.inv_freq", "embeddings.position_ids"),
)
"""Suffixes of tensors in older files that are no weights: masks, rotary tables and the numbers of positions."""
OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Suffixes in BERT's first files -> those of today."""


@dataclass(frozen=True)
class ParameterMapping:
    """Our parameter `name`, whole, of `shape`, is made of the tensors `keys` of a file in the form `form`."""

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    form: Same | Fused

    def ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """Their tensors, in the order of `keys`, as our parameter. A Mistake if they do not have the right shapes."""
        try:
            tensor = self.form.to_ours(tensors, model)
        except Mistake:
            raise
        except Exception as error:  # einops and torch have different errors for sizes that do not fit
            sizes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise Mistake(f"{self.keys[0]} {sizes:.100} does not make {self.name} {list(self.shape)}{OTHER}") from error
        if tuple(tensor.shape) != self.shape:
            raise Mistake(f"{self.keys[0]} makes {self.name} {list(tensor.shape)}, this model's is {list(self.shape)}{OTHER}")
        return tensor

    def theirs(self, tensor: Tensor, model: AnyModel) -> dict[str, Tensor]:
        """Our parameter as their tensors, by key."""
        return dict(zip(self.keys, self.form.to_theirs(tensor, model), strict=True))

    def their_shapes(self, model: AnyModel) -> dict[str, tuple[int, ...]]:
        """The shapes of their tensors, by key."""
        return {key: tuple(tensor.shape) for key, tensor in self.theirs(torch.empty(self.shape, device="meta"), model).items()}


@dataclass(frozen=True)
class Plan:
    """How a model is read from files: every parameter, in the order of the layers, with keys as in the files."""

    parameters: list[ParameterMapping]
    copy: str | None
    """The key of a tied head that is in the files beside the embedding. It must be equal to the embedding."""
    initial: tuple[str, ...] = ()
    """The parameters of heads that the files of a plain encoder do not hold, in the order of the layers. They get initial values."""


def plan(model: AnyModel, family: Family, shapes_in_files: Mapping[str, tuple[int, ...]]) -> Plan:
    """How `model` is read from files with tensors of these names and shapes.

    A tensor that is missing, left over, doubled or of the wrong shape is a Mistake. No tensor is read to find out. A BERT without heads
    (transformers' BertModel) is a plain encoder: its heads are `initial`.
    """
    if model.num_layers > len(shapes_in_files):
        raise Mistake(f"the weights hold {len(shapes_in_files)} tensors, too few for a {family.name} of {model.num_layers} layers{OTHER}")
    keys, head = _keys_in_files(family, shapes_in_files)
    table = f"{family.modules['embedding'].names[0]}.weight"
    if model.tied and head and table not in keys:  # the files hold the one table under the head's name, where it may stand as well
        keys[table], head = head, None
    parameters, used, initial = [], set[str](), []
    plain = is_plain_encoder(model, shapes_in_files)
    for parameter in parameter_mappings(model, family):
        bare = [key.removeprefix(family.prefix) for key in parameter.keys]
        if parameter.name == "head.weight":
            keys |= {bare[0]: head} if head else {}
        missing = [key for key in bare if key not in keys]
        if missing and plain and missing[0].startswith(BERT_HEADS):
            initial.append(parameter.name)
            continue
        if missing:
            what = f"the weights hold no {missing[0]}, which {parameter.name} is made of"
            raise Mistake(f"{what} → is this a {family.name} of {model.num_layers} layers?")
        used.update(bare)  # a T5's table of relative positions is used by every block of its stack
        in_files = ParameterMapping(parameter.name, parameter.shape, tuple(keys[key] for key in bare), parameter.form)
        in_files.ours([torch.empty(shapes_in_files[key], device="meta") for key in in_files.keys], model)
        parameters.append(in_files)
    if unused := [bare for bare in keys if bare not in used]:
        raise Mistake(f"the weights hold {len(unused)} tensors that this model lacks, the first is {unused[0]}{OTHER}")
    return Plan(parameters, head if model.tied else None, tuple(initial))


def _keys_in_files(family: Family, names: Mapping[str, object]) -> tuple[dict[str, str], str | None]:
    """({name without the prefix: name in the files} of all weights but the head's, the head's name in the files)."""
    both = "the weights hold both {} and {}, which are the same → take one of them out"
    keys: dict[str, str] = {}
    for name in names:
        bare = name.removeprefix(family.prefix)
        for old, new in OLD_SUFFIXES.items():
            bare = bare.removesuffix(old) + new if bare.endswith(old) else bare
        if original := family.copies.get(bare):
            if original in names:
                continue
            bare = original
        if bare in keys:
            raise Mistake(both.format(keys[bare], name))
        if not name.endswith(BUFFERS):
            keys[bare] = name
    heads = [keys.pop(f"{head}.weight") for head in family.heads if f"{head}.weight" in keys]
    if len(heads) > 1:
        raise Mistake(both.format(*heads[:2]))
    return keys, heads[0] if heads else None


def with_heads_in_files(model: AnyModel, names: Collection[str]) -> AnyModel:
    """The model with the heads that the files hold: a BERT's configuration may name a class without the sentence head that they have.

    A plain encoder with a pooler has a sentence head, so that the pooler is kept.
    """
    if not isinstance(model, BERT):
        return model
    pooler, classifier = (f"{BERT_MODULES[f'sentence.{part}'].names[0]}.weight" for part in ("pooler", "classifier"))
    pooled = is_plain_encoder(model, names) and any(name.endswith(pooler) for name in names)
    return model.model_copy(update={"sentence_head": pooled or classifier in names})


def is_plain_encoder(model: AnyModel, names: Collection[str]) -> bool:
    """Whether files with tensors of these names hold a BERT without its heads, as transformers' BertModel writes it."""
    return isinstance(model, BERT) and not any(name.startswith(BERT_HEADS) for name in names)


def from_hf(model: AnyModel, family: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter of `model`, whole, by our logical names, from their tensors. The same errors as `plan`.

    Of a plain encoder, every parameter but those of the heads.
    """
    if family not in FAMILIES:
        raise Mistake(f"model_type = {family!r} is not a family we can read or write → use {', '.join(FAMILIES)}")
    planned = plan(model, FAMILIES[family], {key: tuple(tensor.shape) for key, tensor in state_dict.items()})
    weights = {parameter.name: parameter.ours([state_dict[key] for key in parameter.keys], model) for parameter in planned.parameters}
    if planned.copy:
        check_copy(state_dict[planned.copy], weights["embedding.weight"])
    return weights


def check_copy(head: Tensor, embedding: Tensor) -> None:
    """Raise a Mistake if the files of a tied model contain a head that is not equal to the embedding."""
    if not torch.equal(head, embedding):
        raise Mistake("model.tied = True, but the head's weights are not the embedding's → set tie_word_embeddings to false")


def parameter_mappings(model: AnyModel, family: Family) -> list[ParameterMapping]:
    """A mapping for each parameter, in the order of the layers, with keys as transformers writes them."""
    if misfits := unlike(model, family):
        raise Mistake(misfits[0])
    modules = family.modules | ({} if model.mlp in GATED_MLPS.values() else family.ungated) | {"head": Same(family.heads[0])}
    mappings = []
    for name, shape in shapes(model).items():
        module, _, weight_or_bias = name.rpartition(".")
        block = re.search(r"\bblocks\.(\d+)\.", module)
        number = block[1] if block else ""
        form = modules[module.replace(f".{number}.", ".*.") if number else module]
        prefix = "" if module == "head" or form.names[0].startswith(family.unprefixed) else family.prefix
        keys = tuple(f"{prefix}{theirs.replace('*', number)}.{weight_or_bias}" for theirs in form.names)
        mappings.append(ParameterMapping(name, shape, keys, form))
    return mappings


def family_of(model: AnyModel) -> str:
    """The family that can express the model. If there is none, a Mistake lists every setting that the nearest one cannot express."""
    misfits = {name: unlike(model, family) for name, family in FAMILIES.items() if family.kind == model.kind}
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[nearest]:
        settings = "; ".join(misfits[nearest])
        raise Mistake(f"no family of transformers that we write ({', '.join(misfits)}) is this model: {settings} → train one that fits")
    return nearest


def unlike(model: AnyModel, family: Family) -> list[str]:
    """A sentence for each setting of the model that the family cannot express."""
    if model.kind != family.kind:
        return [f"model.kind = {model.kind!r} is no {family.name} → that has {family.kind!r}"]
    misfits = []
    for field, values in {"attention": ATTENTIONS, **family.holds}.items():
        if getattr(model, field) not in values:
            allowed = " or ".join(repr(value) for value in dict.fromkeys(values))
            misfits.append(f"model.{field} = {getattr(model, field)!r} is no {family.name} → that has {allowed}")
    if not family.grouped and model.num_kv_heads != model.num_heads:
        has = f"that has as many as num_heads = {model.num_heads}"
        misfits.append(f"model.num_kv_heads = {model.num_kv_heads} is no {family.name} → {has}")
    for first, second in family.equal:
        if getattr(model, first) != getattr(model, second):
            both = f"model.{first} = {getattr(model, first)} with model.{second} = {getattr(model, second)}"
            misfits.append(f"{both} is no {family.name} → that has both or neither")
    if not family.free_head_size and model.head_size * model.num_heads != model.hidden_size:
        has = f"that has hidden_size / num_heads = {model.hidden_size} / {model.num_heads}"
        misfits.append(f"model.head_size = {model.head_size} is no {family.name} → {has}")
    if family.free_head_size and not family.free_hidden_size and model.hidden_size % model.num_heads:
        sizes = f"model.num_heads = {model.num_heads} with model.hidden_size = {model.hidden_size}"
        misfits.append(f"{sizes} is no {family.name} → there the one divides the other")
    if isinstance(model, GPT) and model.position == "rotary" and int(model.head_size * (model.rotary_fraction or 0)) % 2:
        what = f"model.rotary_fraction = {model.rotary_fraction} of {model.head_size} features, an odd number,"
        misfits.append(f"{what} is no {family.name} → that turns an even number of them")
    return misfits


def shapes(model: AnyModel) -> dict[str, tuple[int, ...]]:
    """Logical name -> whole shape of every parameter, in the order of the layers. Nothing is built or drawn."""
    result: dict[str, tuple[int, ...]] = {}
    modules = _bert_modules(model) if isinstance(model, BERT) else _t5_modules(model) if isinstance(model, T5) else _modules(model)
    for name, shape, bias in modules:
        result[f"{name}.weight"] = shape
        if bias:
            result[f"{name}.bias"] = shape[:1]
    if isinstance(model, BERT):
        result["head_bias.bias"] = (model.vocab_size,)
    return result


Module: TypeAlias = tuple[str, tuple[int, ...], bool]
"""The name of a module with parameters, the shape of its weight, and whether it has a bias."""


def _modules(model: AnyModel) -> Iterator[Module]:
    """The modules of a GPT of these families."""
    table = model.vocab_size, model.hidden_size
    yield "embedding", table, False
    if model.position == "learned":
        yield "position", (model.seq_length, model.hidden_size), False
    yield from _block_modules(model)
    yield "final_norm", (model.hidden_size,), _norm_bias(model)
    if not model.tied:
        yield "head", table, False


def _block_modules(model: AnyModel) -> Iterator[Module]:
    d, f = model.hidden_size, model.ffn_size
    norm_bias, gates = _norm_bias(model), 2 if model.mlp in GATED_MLPS.values() else 1
    for block in (f"blocks.{i}" for i in range(model.num_layers)):
        yield f"{block}.attention_norm", (d,), norm_bias
        yield f"{block}.attention.qkv", (sum(qkv_rows(model)), d), model.qkv_bias
        yield f"{block}.attention.output", (d, model.num_heads * model.head_size), model.output_bias
        for part in "qk" if model.qk_norm else "":
            yield f"{block}.attention.{part}_norm", (model.head_size,), norm_bias
        yield f"{block}.mlp_norm", (d,), norm_bias
        yield f"{block}.mlp.up", (gates * f, d), model.bias
        yield f"{block}.mlp.down", (d, f), model.bias


def _norm_bias(model: AnyModel) -> bool:
    return model.norm == "layernorm" and model.bias


def _bert_modules(model: BERT) -> Iterator[Module]:
    """All modules of a BERT but the bias of its logits, which has no weight."""
    d = model.hidden_size
    yield "embedding", (model.vocab_size, d), False
    yield "token_types", (model.token_types, d), False
    yield "position", (model.seq_length, d), False
    if model.residual == "post_norm":
        yield "embedding_norm", (d,), True
    yield from _block_modules(model)
    if model.residual == "pre_norm":
        yield "final_norm", (d,), True
    if model.sentence_head:
        yield "sentence.pooler", (d, d), True
        yield "sentence.classifier", (2, d), True
    yield "masked_lm.dense", (d, d), True
    yield "masked_lm.norm", (d,), True


def _t5_modules(model: T5) -> Iterator[Module]:
    """The modules of a T5, of which none has a bias."""
    d, f, size, table = model.hidden_size, model.ffn_size, model.num_heads * model.head_size, (model.vocab_size, model.hidden_size)
    gates = 2 if model.mlp in GATED_MLPS.values() else 1
    yield "embedding", table, False
    for stack, number in (("encoder", model.num_encoder_layers), ("decoder", model.num_layers)):
        for block in (f"{stack}.blocks.{i}" for i in range(number)):
            yield f"{block}.attention_norm", (d,), False
            yield f"{block}.attention.qkv", (3 * size, d), False
            yield f"{block}.attention.output", (d, size), False
            yield f"{block}.attention.position", (model.relative_buckets, model.num_heads), False
            yield f"{block}.mlp_norm", (d,), False
            yield f"{block}.mlp.up", (gates * f, d), False
            yield f"{block}.mlp.down", (d, f), False
            if stack == "decoder":
                yield f"{block}.cross_norm", (d,), False
                yield f"{block}.cross_attention.q", (size, d), False
                yield f"{block}.cross_attention.kv", (2 * size, d), False
                yield f"{block}.cross_attention.output", (d, size), False
        yield f"{stack}.final_norm", (d,), False
    if not model.tied:
        yield "head", table, False
