"""Ablations: their lineage, their sweeps, and whether a difference is more than noise."""
