"""Ranks and hosts: what a launcher says in the environment, how ranks meet and agree, process groups, forked ranks, exit codes."""
