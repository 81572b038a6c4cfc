"""Closed forms of what a model costs: parameters and communication, computed from its settings."""
