"""Tensor slicing, the rank grid and collectives. This package imports nothing: every module is imported by its own name."""
