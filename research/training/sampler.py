"""The sampler of an experiment: which samples training reads in which step. Imports no torch, so that `data` need not wait for it."""

from research.config import Experiment
from research.config.layout import batch_sizes
from research.data.batches import Sampler, one_source
from research.data.prepare import Corpus


def sampler_of(experiment: Experiment, corpus: Corpus) -> Sampler:
    """What training reads, in the order that the experiment's seed gives."""
    schedule = experiment.schedule
    return one_source(corpus.train, experiment.model.seq_length, batch_sizes(schedule), schedule.micro_batch_size, experiment.seed)
