"""The sampler of an experiment: which samples training reads in which step. Imports no torch, so that `data` need not wait for it."""

from parallel.errors import Mistake
from research.config import Experiment
from research.config.layout import batch_sizes, sequence_lengths
from research.data.batches import StreamSampler
from research.data.blend import Blend
from research.data.prepare import Corpus
from research.data.sources import stages, training_texts


def blend_of(experiment: Experiment) -> Blend:
    """Which source each sample comes from. A Mistake if the weights do not work."""
    train = experiment.data.train
    try:
        return Blend(list(training_texts(train)), stages(train, batch_sizes(experiment.schedule).before), experiment.seed)
    except Mistake as mistake:
        raise Mistake(f"data.train: {mistake}") from None


def sampler_of(experiment: Experiment, corpus: Corpus) -> StreamSampler:
    """What training reads, in the order that the experiment's seed gives."""
    sources, blend, length = list(corpus.sources.values()), blend_of(experiment), experiment.model.seq_length
    sizes, lengths = batch_sizes(experiment.schedule), sequence_lengths(experiment)
    return StreamSampler(sources, blend, length, sizes, experiment.schedule.micro_batch_size, experiment.seed, lengths)
