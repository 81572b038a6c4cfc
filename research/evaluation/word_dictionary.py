"""A word dictionary learned from pairs of sentences by IBM model 1 (Brown et al., 1993): the baseline that translates word by word."""

import re
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"\w+")
ROUNDS = 5
"""Of expectation maximisation."""


class WordDictionary:
    """For each word of the sources, in lower case, the word of the targets with the largest t(target word | source word)."""

    def __init__(self, pairs: Sequence[tuple[str, str]], rounds: int = ROUNDS) -> None:
        """Learns from (source, target). A word of a target comes from each word of its source, or from none, as likely as t says."""
        self.sources: dict[str, int] = {"": 0}  # no word
        self.targets: dict[str, int] = {}
        sources, targets, places, place = [], [], [], 0
        for source, target in pairs:
            words = [0, *(self.sources.setdefault(word.lower(), len(self.sources)) for word in WORD.findall(source))]
            for word in WORD.findall(target):
                sources.append(words)
                targets += [self.targets.setdefault(word, len(self.targets))] * len(words)
                places += [place] * len(words)
                place += 1
        flat, place_of = np.array([word for words in sources for word in words], np.int64), np.array(places, np.int64)
        both, which = np.unique(flat * max(len(self.targets), 1) + np.array(targets, np.int64), return_inverse=True)
        self.source_of, self.target_of = both // max(len(self.targets), 1), both % max(len(self.targets), 1)
        self.t = np.full(len(both), 1 / max(len(self.targets), 1))
        """t(target_of[i] | source_of[i]) for each two words that are in one pair."""
        for _ in range(rounds):
            here = self.t[which]
            shares = here / np.bincount(place_of, here)[place_of]  # of each word of a source in a word of its target
            counts = np.bincount(which, shares, len(both))
            self.t = counts / np.bincount(self.source_of, counts)[self.source_of]
        order = np.lexsort((self.target_of, -self.t, self.source_of))  # the likeliest first; of equals the one that was seen first
        first = order[np.unique(self.source_of[order], return_index=True)[1]]
        names, targets_of = list(self.sources), list(self.targets)
        self.best = {names[self.source_of[i]]: targets_of[self.target_of[i]] for i in first.tolist()}

    def translated(self, text: str) -> str:
        """The text with each word replaced by its translation, or left as it is if there is none. The first letter stays a capital."""
        found = WORD.sub(lambda word: self.best.get(word[0].lower(), word[0]), text)
        return found[:1].upper() + found[1:] if text[:1].isupper() else found
