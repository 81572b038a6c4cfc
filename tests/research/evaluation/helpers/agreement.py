"""Generates research/evaluation/builtin/agreement.jsonl; run as a script, it prints the file."""

import json
import sys
from collections.abc import Iterator

NOUNS = [("senator", "senators"), ("law", "laws"), ("nation", "nations"), ("farmer", "farmers"), ("ship", "ships"), ("worker", "workers")]
VERBS = [("helps", "help"), ("shows", "show"), ("needs", "need"), ("brings", "bring"), ("has", "have"), ("keeps", "keep")]
OBJECTS = ["peace", "the people", "more money", "good roads", "the war", "the public debt"]
PEOPLE = [("man", "men", "himself"), ("woman", "women", "herself"), ("citizen", "citizens", ""), ("soldier", "soldiers", "")]


def pairs() -> Iterator[tuple[str, str, str]]:
    """(paradigm, good, bad)."""
    for i, (one, many) in enumerate(NOUNS):
        for j, (does, do) in enumerate(VERBS):
            thing = OBJECTS[(i + j) % len(OBJECTS)]
            yield "subject_verb", f"The {one} {does} {thing}.", f"The {one} {do} {thing}."
            yield "subject_verb", f"The {many} {do} {thing}.", f"The {many} {does} {thing}."
            other = NOUNS[(i + j + 1) % len(NOUNS)]
            yield "attractor", f"The {one} of the {other[1]} {does} {thing}.", f"The {one} of the {other[1]} {do} {thing}."
            yield "attractor", f"The {many} of the {other[0]} {do} {thing}.", f"The {many} of the {other[0]} {does} {thing}."
        for this, these in (("this", "these"), ("that", "those")):
            yield "determiner_noun", f"We must not forget {this} {one}.", f"We must not forget {these} {one}."
            yield "determiner_noun", f"We must not forget {these} {many}.", f"We must not forget {this} {many}."
            yield "determiner_noun", f"I have spoken of {this} {one} before.", f"I have spoken of {this} {many} before."
            yield "determiner_noun", f"I have spoken of {these} {many} before.", f"I have spoken of {these} {one} before."
    for one, many, itself in PEOPLE:
        for verb in ("defended", "protected", "blamed", "helped"):
            yield "reflexive", f"The {many} {verb} themselves.", f"The {many} {verb} {itself or 'himself'}."
            if itself:
                yield "reflexive", f"The {one} {verb} {itself}.", f"The {one} {verb} themselves."


def lines() -> str:
    """The content of the file."""
    return "".join(json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": uid}) + "\n" for uid, good, bad in pairs())


if __name__ == "__main__":
    sys.stdout.write(lines())
