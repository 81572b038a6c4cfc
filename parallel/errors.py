"""The one error a user is meant to read: a sentence with both numbers and the way out. Imports nothing."""


class Mistake(ValueError):
    """A setting, a file or a command that cannot work, said in one sentence ending in what would work.

    Shown as `error  <sentence>` by rank 0, without a traceback, exit code 2 (research/launch.py does both).
    Example: `Mistake("parallel.tensor = 3 does not divide model.num_heads = 8 → use 1, 2, 4 or 8")`.
    """
