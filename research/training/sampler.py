"""The samples of an experiment: which ones training reads in which step, and which ones a validation predicts.

Imports no torch, so that `data` need not wait for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.config import chosen
from models.encoder_config import T5
from parallel.errors import Mistake
from research.config import Experiment
from research.config.examples import CONFINED, EXAMPLES, PACKED, STREAM, Masked
from research.config.layout import batch_sizes, sequence_lengths
from research.data.batches import Sampler, StreamSampler
from research.data.blend import Blend
from research.data.confined import ConfinedStream
from research.data.examples import Examples, ExampleSampler
from research.data.fill_in_middle import FillInMiddleExamples
from research.data.held_out import HeldOutSamples, held_out_samples
from research.data.masked_lm import MaskedExamples
from research.data.packing import PackedDocuments
from research.data.pairs import JoinedPairs, PairExamples
from research.data.prepare import Corpus, HeldOut, held_out_texts
from research.data.sources import stages, training_texts
from research.data.span_corruption import SpanExamples
from research.data.supervised import SupervisedExamples
from research.data.token_store import TokenStore

CLASSES: dict[str, type[Examples]] = {
    CONFINED: ConfinedStream,
    PACKED: PackedDocuments,
    "fill_in_middle": FillInMiddleExamples,
    "masked": MaskedExamples,
    "pairs": JoinedPairs,
    "spans": SpanExamples,
    "supervised": SupervisedExamples,
}
"""The word, or the `kind` of the object, in data.examples -> its class."""
CLASSES_OF_T5: dict[str, type[Examples]] = {**CLASSES, "pairs": PairExamples}
"""The same for a model with an encoder and a decoder."""
SEGMENTS = ("segments",)
"""What travels through the model beside x if attention is confined: models.segments.SEGMENTS, without torch."""
TOKEN_TYPES = ("token_types",)
"""What travels through a BERT beside x if its samples are two sentences."""
PREDICTED_SAMPLES = ("masked", "spans", "pairs")
"""Kinds of samples whose like a validation predicts. With the others it predicts a text token by token, so that all GPTs compare."""


def blend_of(experiment: Experiment) -> Blend:
    """Which source each sample comes from. A Mistake if the weights do not work."""
    train = experiment.data.train
    try:
        return Blend(list(training_texts(train)), stages(train, batch_sizes(experiment.schedule).before), experiment.seed)
    except Mistake as mistake:
        raise Mistake(f"data.train: {mistake}") from None


def examples_class(experiment: Experiment, variants: Mapping[str, Any]) -> type[Examples] | None:
    """The class of the samples; None for windows of the stream. `variants`: what the experiment names of its variant.py."""
    examples = experiment.data.examples
    if examples == STREAM:
        return None
    classes = CLASSES_OF_T5 if isinstance(experiment.model, T5) else CLASSES
    return chosen(EXAMPLES, examples if isinstance(examples, str) else examples.kind, classes, variants)


def context_of(experiment: Experiment, variants: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that the samples bring beside ids and labels, which models.gpt.layers takes as `context`."""
    examples, found = experiment.data.examples, examples_class(experiment, variants)
    if isinstance(experiment.model, T5):
        return SEGMENTS
    if isinstance(examples, Masked) and examples.sentence_order:
        return TOKEN_TYPES
    confines = found is not None and found.confines if isinstance(examples, str) else examples.confines
    return SEGMENTS if confines else ()


def sampler_of(experiment: Experiment, corpus: Corpus, variants: Mapping[str, Any]) -> Sampler:
    """What training reads, in the order that the experiment's seed gives."""
    sources, blend = list(corpus.sources.values()), blend_of(experiment)
    sizes, micro_batch_size, seed = batch_sizes(experiment.schedule), experiment.schedule.micro_batch_size, experiment.seed
    make = examples_maker(experiment, corpus, variants)
    if make is None:
        length = experiment.model.seq_length
        return StreamSampler(sources, blend, length, sizes, micro_batch_size, seed, sequence_lengths(experiment))
    return ExampleSampler([make(store) for store in sources], blend, sizes, micro_batch_size, seed)


def held_out_of(experiment: Experiment, corpus: Corpus, variants: Mapping[str, Any]) -> list[HeldOut | HeldOutSamples]:
    """What a validation predicts of each held-out text."""
    tokens, examples = experiment.schedule.validate_tokens, experiment.data.examples
    make = examples_maker(experiment, corpus, variants)
    if make is None or isinstance(examples, str) or examples.kind not in PREDICTED_SAMPLES:
        return [*held_out_texts(corpus, tokens)]
    return [held_out_samples(make(store), tokens, corpus.tokenizer, source) for source, store in corpus.held_out.items()]


def examples_maker(experiment: Experiment, corpus: Corpus, variants: Mapping[str, Any]) -> Callable[[TokenStore], Examples] | None:
    """What makes the samples of a store of this corpus; None for windows of the stream."""
    found, model = examples_class(experiment, variants), experiment.model
    if found is None:
        return None
    options: dict[str, Any] = {} if isinstance(experiment.data.examples, str) else experiment.data.examples.options
    if found is PackedDocuments:
        options |= {"cache": corpus.cache}
    if isinstance(model, T5):
        options |= {"source_length": model.source_length}
        if found is SpanExamples:
            options |= {"start_token": model.start_token}
    make: Callable[..., Examples] = found
    return lambda store: make(store, corpus.tokenizer, model.seq_length, experiment.seed, **options)
