"""What a sample is made of: the settings of the classes of examples (research/data/examples.py). Imports no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from research.config.settings import Settings, Text

SECTION = "data.examples"
Rate = Annotated[float, Field(ge=0, le=1)]


class FillInMiddle(Settings):
    """Windows of the stream in which a share of the documents is rearranged, so that a model learns to fill in a middle."""

    SECTION: ClassVar[str] = SECTION

    kind: Literal["fill_in_middle"] = Field(default="fill_in_middle", description="the class of examples")
    rate: Rate = Field(description="share of the documents that are rearranged; 0: none, 1: all that can be")
    spm_rate: Rate = Field(description="share of the rearranged documents whose suffix comes first; of the others the prefix does")
    confine: bool = Field(description="attention confined to each document")
    prefix: Text = Field(default="<fim_prefix>", description="the token in front of the prefix")
    suffix: Text = Field(default="<fim_suffix>", description="the token in front of the suffix")
    middle: Text = Field(default="<fim_middle>", description="the token in front of the middle")

    @model_validator(mode="after")
    def _different(self) -> "FillInMiddle":
        if len({self.prefix, self.suffix, self.middle}) < 3:
            raise ValueError(
                f"{SECTION}: prefix = {self.prefix!r:.60}, suffix = {self.suffix!r:.60} and middle = {self.middle!r:.60} are not three "
                "tokens → give each its own"
            )
        return self


class Spans(Settings):
    """Windows of the stream in which spans are replaced by sentinels, and the spans as what is to be predicted (T5)."""

    SECTION: ClassVar[str] = SECTION

    kind: Literal["spans"] = Field(default="spans", description="the class of examples")
    rate: float = Field(gt=0, lt=1, description="share of the tokens that are replaced; T5: 0.15")
    mean_length: float = Field(ge=1, description="mean length of the spans, in tokens; T5: 3")
    sentinels: Text = Field(default="<extra_id_{}>", description="the tokens that stand for the spans of a sample, {} being 0, 1, 2, …")

    @model_validator(mode="after")
    def _numbered(self) -> "Spans":
        if self.sentinels.count("{}") != 1:
            raise ValueError(f"{SECTION}.sentinels = {self.sentinels!r:.60} has no place for a number → write it as <extra_id_{{}}>")
        return self


class Masked(Settings):
    """Windows of the stream in which a share of the tokens is to be predicted, most of them masked (BERT)."""

    SECTION: ClassVar[str] = SECTION

    kind: Literal["masked"] = Field(default="masked", description="the class of examples")
    rate: float = Field(gt=0, lt=1, description="share of the tokens that are predicted; BERT: 0.15")
    mask: Text = Field(default="<mask>", description="the token that masks; it stands for 80 % of them, another one for 10 %")
