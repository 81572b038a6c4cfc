"""WikiText as prose: its tokens put together again, by the rules that Megatron-LM and lm-evaluation-harness share."""

import re

PLAIN: tuple[tuple[str, str], ...] = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
BRACKETS = (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}")
QUOTES = (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")
LAST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenized(text: str) -> str:
    """The prose. The second rule puts its own pattern for what it has found, a slip of theirs that comparable figures need."""
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text.replace("s '", "s'"))
    for old, new in PLAIN:
        text = text.replace(old, new)
    for pattern, put in (*BRACKETS, *QUOTES):
        text = re.sub(pattern, put, text)
    for old, new in LAST:
        text = text.replace(old, new)
    return text


def pages(text: str) -> list[str]:
    """The articles, each from its heading ` = Title = ` on, as EleutherAI/wikitext_document_level has them."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append([])
        found[-1].append(line)
    *before, last = ["\n".join(lines) for lines in found]
    return [page for page in before if page.strip()] + [last]
