"""The sampler of an experiment: which samples training reads in which step. Imports no torch, so that `data` need not wait for it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from models.config import chosen
from parallel.errors import Mistake
from research.config import Experiment
from research.config.examples import CONFINED, EXAMPLES, PACKED, STREAM
from research.config.layout import batch_sizes, sequence_lengths
from research.data.batches import Sampler, StreamSampler
from research.data.blend import Blend
from research.data.confined import ConfinedStream
from research.data.examples import Examples, ExampleSampler
from research.data.fill_in_middle import FillInMiddleExamples
from research.data.masked_lm import MaskedExamples
from research.data.packing import PackedDocuments
from research.data.prepare import Corpus
from research.data.sources import stages, training_texts
from research.data.span_corruption import SpanExamples
from research.data.supervised import SupervisedExamples

CLASSES: dict[str, type[Examples]] = {
    CONFINED: ConfinedStream,
    PACKED: PackedDocuments,
    "fill_in_middle": FillInMiddleExamples,
    "masked": MaskedExamples,
    "spans": SpanExamples,
    "supervised": SupervisedExamples,
}
"""The word, or the `kind` of the object, in data.examples -> its class."""
SEGMENTS = ("segments",)
"""What travels through the model beside x if attention is confined: models.segments.SEGMENTS, without torch."""


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
    return chosen(EXAMPLES, examples if isinstance(examples, str) else examples.kind, CLASSES, variants)


def context_of(experiment: Experiment, variants: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that the samples bring beside ids and labels, which models.gpt.layers takes as `context`."""
    examples, found = experiment.data.examples, examples_class(experiment, variants)
    confines = found is not None and found.confines if isinstance(examples, str) else examples.confines
    return SEGMENTS if confines else ()


def sampler_of(experiment: Experiment, corpus: Corpus, variants: Mapping[str, Any]) -> Sampler:
    """What training reads, in the order that the experiment's seed gives."""
    sources, blend, length = list(corpus.sources.values()), blend_of(experiment), experiment.model.seq_length
    sizes, micro_batch_size, seed = batch_sizes(experiment.schedule), experiment.schedule.micro_batch_size, experiment.seed
    found = examples_class(experiment, variants)
    if found is None:
        return StreamSampler(sources, blend, length, sizes, micro_batch_size, seed, sequence_lengths(experiment))
    make: Callable[..., Examples] = found
    if found is PackedDocuments:
        make = functools.partial(make, cache=corpus.cache)
    if not isinstance(experiment.data.examples, str):
        make = functools.partial(make, **experiment.data.examples.options)
    return ExampleSampler([make(store, corpus.tokenizer, length, seed) for store in sources], blend, sizes, micro_batch_size, seed)
