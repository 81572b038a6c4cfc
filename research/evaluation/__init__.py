"""Tasks: texts that are asked of a model, and what its answers are worth. Written against research/evaluation/scorer.py alone: no torch."""
