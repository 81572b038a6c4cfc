"""Ablations: forks of an experiment, what they declare to change, runs over seeds, and whether they differ."""
