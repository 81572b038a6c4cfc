"""The command line: `python -m research VERB`, one file for each verb."""
