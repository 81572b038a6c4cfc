"""Ablations: experiments that differ in one thing, run over seeds, and compared."""
