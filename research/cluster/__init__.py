"""Ranks and hosts: what a launcher says in the environment, the process groups of a run, ranks forked on this machine, exit codes."""
