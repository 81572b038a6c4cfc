"""The model config: sizes, norm, MLP, position encoding, … of a GPT. Imports no torch, so that errors come in milliseconds."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FieldSerializationInfo, field_serializer, model_validator

from parallel.errors import Mistake

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
ATTENTIONS = ("softmax",)
MLPS = ("gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu", "geglu_tanh")
RESIDUALS = ("pre_norm", "post_norm", "parallel")
INITS = ("gpt2", "small_wang")
CHOICES = {"norm": NORMS, "position": POSITIONS, "attention": ATTENTIONS, "mlp": MLPS, "residual": RESIDUALS, "init": INITS}
VARIANT = "variant:"
"""`norm="variant:MyNorm"` names the class MyNorm of the experiment's variant.py instead of a registered class."""

LLAMA, LLAMA_3 = "Llama 2: fraction 1.0, base 10000.0, scaling none", "Llama 3.1: factor 8.0, low 1.0, high 4.0, original length 8192"
ROTARY = {
    "rotary_fraction": ("position", ("rotary",), LLAMA),
    "rotary_base": ("position", ("rotary",), LLAMA),
    "rotary_scaling": ("position", ("rotary",), LLAMA),
    "rotary_factor": ("rotary_scaling", ("linear", "llama3"), LLAMA_3),
    "rotary_low_factor": ("rotary_scaling", ("llama3",), LLAMA_3),
    "rotary_high_factor": ("rotary_scaling", ("llama3",), LLAMA_3),
    "rotary_original_length": ("rotary_scaling", ("llama3",), LLAMA_3),
}
"""Rotary setting -> (the setting it depends on, the values of that with which it has an effect, an example for the error message)."""

FOLLOWING: dict[str, Callable[["GPT"], Any]] = {
    "head_size": lambda model: model.hidden_size // model.num_heads,
    "output_bias": lambda model: model.bias,
}
"""Setting -> its value where it is not set. It is saved as None then, and follows when the settings it depends on are overridden."""

Size = Annotated[int, Field(gt=0)]
Chance = Annotated[float, Field(ge=0, lt=1)]


class GPT(BaseModel):
    """The settings of a decoder-only transformer. GPT-2, GPT-NeoX/Pythia, Llama, Mistral, Qwen2 and Qwen3 are special cases.

    models/conversion/read_config.py makes them from a transformers configuration.

    Every setting affects results, so none has a default. The exceptions are `attention`, which older experiments do not name, the
    rotary settings, which must be set if and only if they have an effect, and those in FOLLOWING, which follow from other settings
    unless they are set.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    kind: Literal["gpt"] = Field(default="gpt", description="the kind of model; fixed by the class that config.py names")
    num_layers: Size = Field(description="transformer blocks; distributed over pipeline stages")
    hidden_size: Size = Field(description="width of the residual stream")
    num_heads: Size = Field(description="query heads, each head_size wide; distributed over tensor ranks")
    num_kv_heads: Size = Field(description="= num_heads: multi-head; fewer: grouped-query attention; 1: multi-query")
    head_size: Size = Field(  # type: ignore[assignment]  # a value that follows is filled in by _consistent
        default=None, description="width of one head; not set: hidden_size / num_heads (Qwen3 sets another)"
    )
    ffn_size: Size = Field(description="inner width of the MLP (of each of gate and up in swiglu, geglu, geglu_tanh)")
    vocab_size: Size = Field(description="as the tokenizer counts it; padding for tensor ranks is added and inert")
    seq_length: Size = Field(description="tokens a sample; longest position of a learned table")
    norm: str = Field(description=f"{', '.join(NORMS)} or variant:Class")
    norm_eps: float = Field(gt=0, description="added to the variance before its square root")
    position: str = Field(description=f"{', '.join(POSITIONS)} or variant:Class")
    attention: str = Field(default="softmax", description=f"{', '.join(ATTENTIONS)} or variant:Class")
    mlp: str = Field(description=f"{', '.join(MLPS)} or variant:Class")
    residual: str = Field(description=f"{', '.join(RESIDUALS)} or variant:Class")
    init: str = Field(description=f"{', '.join(INITS)} or variant:Class")
    bias: bool = Field(description="biases in the MLP and the layernorms")
    qkv_bias: bool = Field(description="biases of the query, key and value projections")
    output_bias: bool = Field(  # type: ignore[assignment]
        default=None, description="bias of attention's output projection; not set: as bias"
    )
    qk_norm: bool = Field(description="normalise each head's queries and keys (arXiv:2302.05442, Qwen3)")
    embedding_dropout: Chance = Field(description="of what enters the first block; 0: none, as in all four")
    residual_dropout: Chance = Field(description="of what attention and MLP add to the residual stream")
    mlp_dropout: Chance = Field(description="of the MLP's inner activations")
    attention_dropout: Chance = Field(description="of attention probabilities; above 0 they are computed explicitly: b·h·s² memory")
    tied: bool = Field(description="the head is the transposed embedding; False: a table of its own")
    rotary_fraction: float | None = Field(default=None, gt=0, le=1, description="part of each head that is rotated")
    rotary_base: float | None = Field(default=None, gt=0, description="wavelengths are 2π·base^(2i/d)")
    rotary_scaling: Literal["none", "linear", "llama3"] | None = Field(
        default=None, description="wavelengths made longer for long texts: none, all alike (linear), or only the long ones (Llama 3.1)"
    )
    rotary_factor: float | None = Field(default=None, gt=0, description="how many times longer scaled wavelengths are")
    rotary_low_factor: float | None = Field(default=None, gt=0, description="llama3: wavelengths above original_length / this are scaled")
    rotary_high_factor: float | None = Field(default=None, gt=0, description="llama3: those below original_length / this are not")
    rotary_original_length: Size | None = Field(default=None, description="llama3: tokens a sample before the scaling")

    @property
    def drops(self) -> bool:
        """Whether any dropout is above 0. Batches then carry global sample indices as context."""
        return any((self.embedding_dropout, self.residual_dropout, self.mlp_dropout, self.attention_dropout))

    @field_serializer(*FOLLOWING)
    def _none_where_it_follows(self, value: Any, info: FieldSerializationInfo) -> Any:
        return value if info.field_name in self.model_fields_set else None

    @model_validator(mode="before")
    @classmethod
    def _without_none(cls, settings: Any) -> Any:
        """Takes out what a saved model holds None for."""
        if not isinstance(settings, dict):
            return settings
        return {name: value for name, value in settings.items() if value is not None or name not in FOLLOWING}

    @model_validator(mode="after")
    def _consistent(self) -> "GPT":
        for field, names in CHOICES.items():
            refuse_unknown(f"model.{field}", getattr(self, field), names)

        # A rotary setting is there if and only if the setting it depends on gives it an effect. Variants decide for themselves.
        for field, (decider, values, example) in ROTARY.items() if not self.position.startswith(VARIANT) else ():
            is_set, value = getattr(self, field) is not None, getattr(self, decider)
            if value in values and not is_set:
                raise ValueError(f"model.{decider} = {value!r} needs model.{field} → set it ({example})")
            if value not in values and is_set:
                raise ValueError(f"model.{field} has no effect with model.{decider} = {value!r} → leave it out")
        low, high = self.rotary_low_factor, self.rotary_high_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"model.rotary_low_factor = {low} is not below model.rotary_high_factor = {high} → Llama 3.1 has 1.0 and 4.0")

        if "head_size" not in self.model_fields_set and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_size = {self.hidden_size} → "
                f"use {divisors(self.hidden_size, near=self.num_heads)}, or set model.head_size"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads} → "
                f"use {divisors(self.num_heads, near=self.num_kv_heads)}"
            )
        # Past pydantic's own assignment, which would count the settings as set, and come here again.
        self.__dict__.update({name: follow(self) for name, follow in FOLLOWING.items() if name not in self.model_fields_set})
        return self


def has_variants(model: BaseModel) -> bool:
    """Whether a setting of the model, of whatever kind, names a class of the experiment's variant.py."""
    return any(getattr(model, setting).startswith(VARIANT) for setting in CHOICES)


def chosen(setting: str, value: str, registered: Mapping[str, Any], variants: Mapping[str, Any]) -> Any:
    """What `setting` = `value` names: an entry of `registered`, or with 'variant:Name' one of `variants`, those of variant.py by name."""
    if not value.startswith(VARIANT):
        return registered[value]
    name = value.removeprefix(VARIANT)
    if name not in variants:
        known = ", ".join(sorted(variants)) or "none"
        raise Mistake(f"{setting} = {value!r}, but variant.py defines no class {name} → it defines {known}")
    return variants[name]


def refuse_unknown(setting: str, value: str, names: Collection[str]) -> None:
    """Raises a ValueError unless `value` is one of `names` or 'variant:Name'."""
    if value not in names and not (value.startswith(VARIANT) and value.removeprefix(VARIANT).isidentifier()):
        known = f"{', '.join(names)} or " if names else ""
        raise ValueError(f"{setting} = {value!r} is not known → use {known}variant:YourClass")


def divisors(n: int, near: int) -> str:
    """The (at most six) divisors of n closest to `near`, as the end of a sentence: '1, 2, 4 or 8'."""
    # only to √n, and not beyond 65,536: n may come from a file of unknown origin, and be huge
    small = [i for i in range(1, min(math.isqrt(n), 65_536) + 1) if n % i == 0]
    nearest = sorted(sorted(sorted({*small, *(n // i for i in small)}), key=lambda i: abs(i - near))[:6])
    return " or ".join(filter(None, [", ".join(map(str, nearest[:-1])), str(nearest[-1])]))
