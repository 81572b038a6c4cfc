"""Which verb can use which kind of model: a BERT writes no text, for example. Imports no torch."""

from models.config import GPT
from models.encoder_config import BERT, T5, AnyModel
from parallel.errors import Mistake, listed
from research.config.schema import MODELS

ABILITIES: dict[str, tuple[str, ...]] = {
    "generate": ("gpt", "t5"),
    "evaluate": ("gpt", "t5"),
    "serve": ("gpt", "t5"),
    "embed": ("bert",),
    "export": ("gpt", "bert", "t5"),
    "compare --windows": ("gpt",),
    "research.api": ("gpt",),
}
"""Verb -> the kinds of model that it can use. A verb that is not named can use all of them."""


def refuse_other_kinds(verb: str, model: AnyModel, title: str) -> None:
    """Raises a Mistake if the verb cannot use a model of this kind. `title` names the run."""
    if model.kind in ABILITIES.get(verb, tuple(MODELS)):
        return
    kinds = listed((f"a {MODELS[kind].__name__}" for kind in ABILITIES[verb]), "or")
    others = [other for other, able in ABILITIES.items() if model.kind in able and " " not in other and "." not in other]
    way_out = f"name a run of such a model, or use {listed([*others, 'verify', 'inspect', 'replay'])}"
    raise Mistake(f"{verb} needs {kinds}, and {title} is a {MODELS[model.kind].__name__} → {way_out}")


def writer_of(verb: str, model: AnyModel, title: str) -> GPT | T5:
    """The model, which writes texts, for a verb that uses such a one. A Mistake if it is a BERT."""
    refuse_other_kinds(verb, model, title)
    assert isinstance(model, GPT | T5)
    return model


def bert_of(verb: str, model: AnyModel, title: str) -> BERT:
    """The model, which is a BERT, for a verb that can use no other kind. A Mistake if it is none."""
    refuse_other_kinds(verb, model, title)
    assert isinstance(model, BERT)
    return model


def gpt_of(verb: str, model: AnyModel, title: str) -> GPT:
    """The model, which is a GPT, for a verb that can use no other kind. A Mistake if it is one."""
    refuse_other_kinds(verb, model, title)
    assert isinstance(model, GPT)
    return model
