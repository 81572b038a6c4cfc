"""Stop strings in a text that arrives in pieces: compared with str.find and str.endswith on the whole text."""

import random

from research.generation.stop_strings import StopStringFinder


def test_the_first_is_found_and_what_may_be_a_beginning_is_known():
    """Strings of two letters repeat themselves in every way, so that a wrong table of failures is noticed."""
    rng = random.Random(0)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 3))]
        finder, text = StopStringFinder(stops), ""
        for _ in range(8):
            piece = "".join(rng.choices("ab", k=rng.randint(0, 4)))
            begin, text = finder.push(piece), text + piece
            found = [start for stop in stops if (start := text.find(stop)) >= 0]
            assert begin == (min(found) - len(text) + len(piece) if found else None), (stops, text, piece)
            if found:
                break
            held = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
            assert finder.held == max(held, default=0), (stops, text)
