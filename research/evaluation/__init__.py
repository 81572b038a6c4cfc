"""Evaluation tasks: requests to score texts with a model, and the metrics of its answers. The tasks import no torch."""
