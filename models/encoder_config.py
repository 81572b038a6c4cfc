"""The model configs of the families with an encoder: BERT, an encoder alone, and T5, an encoder and a decoder. Imports no torch.

They have the attributes that the sliced modules ask of a GPT config (`num_kv_heads`, `bias`, …). What a family fixes is a property.
"""

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FieldSerializationInfo, field_serializer, model_validator

from models.config import GPT, INITS, MLPS, Chance, Size, divisors, refuse_unknown

BERT_RESIDUALS = ("post_norm", "pre_norm")
T5_INITS = (*INITS, "t5")


class _Encoder(BaseModel):
    """The settings that BERT and T5 share. Every setting affects results, so none has a default."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    hidden_size: Size = Field(description="width of the residual stream")
    num_heads: Size = Field(description="attention heads; distributed over tensor ranks")
    ffn_size: Size = Field(description="inner width of the MLP (of each of gate and up in swiglu, geglu, geglu_tanh)")
    vocab_size: Size = Field(description="as the tokenizer counts it; padding for tensor ranks is added and inert")
    norm_eps: float = Field(gt=0, description="added to the variance before its square root")
    mlp: str = Field(description=f"{', '.join(MLPS)} or variant:Class")
    init: str = Field(description=f"{', '.join(INITS)} or variant:Class")
    embedding_dropout: Chance = Field(description="of what enters the first block")
    residual_dropout: Chance = Field(description="of what attention and MLP add to the residual stream")
    mlp_dropout: Chance = Field(description="of the MLP's inner activations")
    attention_dropout: Chance = Field(description="of attention probabilities; above 0 they are computed explicitly: b·h·s² memory")

    @property
    def num_kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_heads

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are not normalised."""
        return False

    @property
    def attention(self) -> str:
        """Softmax attention in both directions: every place sees the places before and behind it."""
        return "bidirectional"

    @property
    def drops(self) -> bool:
        """Whether any dropout is above 0. Batches then carry global sample indices as context."""
        return any((self.embedding_dropout, self.residual_dropout, self.mlp_dropout, self.attention_dropout))

    def _refuse_uneven_heads(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_size = {self.hidden_size} → "
                f"use {divisors(self.hidden_size, near=self.num_heads)}"
            )


class BERT(_Encoder):
    """The settings of an encoder with a masked-language-model head (arXiv:1810.04805). Layernorms, learned positions, all biases, tied.

    `residual="post_norm"` is transformers' BertForPreTraining; `"pre_norm"` is the Megatron paper's rearrangement (arXiv:1909.08053,
    §5.3), MegatronBertForPreTraining.
    """

    kind: Literal["bert"] = Field(default="bert", description="the kind of model; fixed by the class that config.py names")
    num_layers: Size = Field(description="transformer blocks; distributed over pipeline stages")
    seq_length: Size = Field(description="tokens a sample; length of the table of positions")
    token_types: Size = Field(description="kinds of tokens, with an embedding each: 2, of the first and the second sentence")
    residual: str = Field(description=f"{', '.join(BERT_RESIDUALS)} or variant:Class")
    sentence_head: bool = Field(description="a pooler, and a head that says whether the second sentence follows the first")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def norm(self) -> str:
        """Layernorm, with bias."""
        return "layernorm"

    @property
    def position(self) -> str:
        """A trained table."""
        return "learned"

    @property
    def bias(self) -> bool:
        """Every linear and every layernorm has a bias."""
        return True

    @property
    def qkv_bias(self) -> bool:
        """As `bias`."""
        return self.bias

    @property
    def output_bias(self) -> bool:
        """As `bias`."""
        return self.bias

    @property
    def tied(self) -> bool:
        """The head is the transposed embedding, with a bias of its own."""
        return True

    @model_validator(mode="after")
    def _consistent(self) -> "BERT":
        for field, names in {"mlp": MLPS, "residual": BERT_RESIDUALS, "init": INITS}.items():
            refuse_unknown(f"model.{field}", getattr(self, field), names)
        self._refuse_uneven_heads()
        return self


class T5(_Encoder):
    """The settings of an encoder and a decoder (arXiv:1910.10683): RMSNorm, pre-norm, relative positions, no biases.

    Every attention to its own rows has a table of relative positions of its own, as in transformers' UMT5. T5 shares one per stack.
    """

    kind: Literal["t5"] = Field(default="t5", description="the kind of model; fixed by the class that config.py names")
    init: str = Field(description=f"{', '.join(T5_INITS)} or variant:Class")
    embedding_dropout: Chance = Field(description="of what enters the first block of either stack, and of what leaves its final norm")
    num_encoder_layers: Size = Field(description="blocks of the encoder; distributed over pipeline stages, in front of the decoder's")
    num_layers: Size = Field(description="blocks of the decoder, which also attend to the encoder's output")
    head_size: Size = Field(  # type: ignore[assignment]
        default=None, description="width of one head; not set: hidden_size / num_heads (T5-3B and T5-11B set another)"
    )
    source_length: Size = Field(description="tokens of a source, which the encoder reads")
    seq_length: Size = Field(description="tokens of a target, which the decoder predicts")
    relative_buckets: Size = Field(description="rows of a table of relative positions: T5 has 32")
    relative_distance: Size = Field(description="distances from here on share the last bucket: T5 has 128")
    tied: bool = Field(description="the head is the transposed embedding, scaled by hidden_size^−½ as in T5 1.0; False: a table of its own")
    start_token: int | None = Field(
        default=None,
        ge=0,
        description="what a target begins with, such as T5's <pad>; not set: end-of-text. Of pairs it is their separator",
    )

    @property
    def norm(self) -> str:
        """RMSNorm."""
        return "rmsnorm"

    @property
    def position(self) -> str:
        """Relative positions: buckets of distances, with a bias for each bucket and head."""
        return "relative"

    @property
    def attention(self) -> str:
        """Softmax attention, of each stack its own (models/t5_attention.py)."""
        return "softmax"

    @property
    def residual(self) -> str:
        """x + attention(norm(x)), and so on."""
        return "pre_norm"

    @property
    def bias(self) -> bool:
        """No linear has a bias."""
        return False

    @property
    def qkv_bias(self) -> bool:
        """As `bias`."""
        return self.bias

    @property
    def output_bias(self) -> bool:
        """As `bias`."""
        return self.bias

    @field_serializer("head_size")
    def _none_where_it_follows(self, value: Any, info: FieldSerializationInfo) -> Any:
        return value if "head_size" in self.model_fields_set else None

    @model_validator(mode="before")
    @classmethod
    def _without_none(cls, settings: Any) -> Any:
        """Takes out a head_size for which a saved model holds None."""
        if isinstance(settings, dict) and settings.get("head_size", 0) is None:
            return {name: value for name, value in settings.items() if name != "head_size"}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> "T5":
        for field, names in {"mlp": MLPS, "init": T5_INITS}.items():
            refuse_unknown(f"model.{field}", getattr(self, field), names)
        if self.relative_buckets % 2 or self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"model.relative_buckets = {self.relative_buckets} with model.relative_distance = {self.relative_distance} → "
                "use an even number of 4 or more, and a distance above half of it (T5: 32 and 128)"
            )
        if self.start_token is not None and self.start_token >= self.vocab_size:
            raise ValueError(
                f"model.start_token = {self.start_token} is none of model.vocab_size = {self.vocab_size} tokens → "
                f"use 0 to {self.vocab_size - 1}, or leave it out"
            )
        if "head_size" not in self.model_fields_set:
            self._refuse_uneven_heads()
            # past pydantic's own assignment, which would count it as set
            self.__dict__["head_size"] = self.hidden_size // self.num_heads
        return self


AnyModel: TypeAlias = GPT | BERT | T5
"""The settings of a model of any kind, which its `kind` tells apart."""
