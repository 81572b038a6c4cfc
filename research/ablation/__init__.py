"""Ablations: forks of an experiment, what they declare to change, and what differs between two of them."""
