"""The sampler of an experiment: which samples training reads in which step. Imports no torch, so that `data` need not wait for it."""

from research.config import Experiment
from research.config.layout import batch_sizes, sequence_lengths
from research.data.batches import Sampler, one_source
from research.data.prepare import Corpus


def sampler_of(experiment: Experiment, corpus: Corpus) -> Sampler:
    """What training reads, in the order that the experiment's seed gives."""
    schedule, length, seed = experiment.schedule, experiment.model.seq_length, experiment.seed
    sizes, lengths = batch_sizes(schedule), sequence_lengths(experiment)
    return one_source(corpus.train, length, sizes, schedule.micro_batch_size, seed, lengths)
