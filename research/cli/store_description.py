"""What `python -m research data PREFIX` shows of a token store: its sizes, how long its documents are, and the texts of some."""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import megabytes, user_path
from research import ROOT
from research.config import Data
from research.data import inspection, run_tokenizer, tokenizer_file
from research.data.inspection import Extract, Lengths
from research.data.megatron_index import file_of
from research.data.stores import LONG, STORE
from research.data.token_store import TokenStore
from research.data.tokenizer import BYTES, GPT2, Tokenizer, declared_vocab_size, is_made_from_text
from research.exchange.limited_tokenizer import try_tokenizer
from research.tracking import format as fmt
from research.tracking import plot
from research.tracking.console import Console
from research.tracking.format import plural, short_path
from research.tracking.plot import LIGHT
from research.tracking.streams import encodes_unicode

FORMATS = (".png", ".svg")
LONGEST, CHARACTERS, BAR = 160, 200, 40
"""The most characters of a name, and of a text, and the columns of the longest bar."""
EIGHTHS = "▏▎▍▌▋▊▉█"
FIXED = (GPT2, BYTES)
"""Built-in tokenizers that are not made from a text."""
MOST_TICKS = 14
"""Numbers below the picture: of more bars, every second or third has one."""


def describe(prefix: Path, texts: int | None, tokenizer_name: str | None, picture: Path | None) -> dict[str, Any]:
    """Prints the store and returns it as JSON data. `texts`: how many documents are decoded; `picture`: where their lengths are drawn."""
    if picture is not None and picture.suffix.lower() not in FORMATS:
        raise Mistake(f"--plot {picture} is neither PNG nor SVG → use {picture.stem or 'lengths'}.png or .svg")
    if tokenizer_name is not None and not texts:
        raise Mistake(f"--tokenizer {tokenizer_name} decodes texts, and none are asked for → add --texts 3")
    store, console = TokenStore(prefix), Console()
    largest = _fact(store, "max_id")
    if largest is None:
        largest = read_largest_id(store)
    tokenizer = find_tokenizer(store, tokenizer_name, largest) if texts else None
    lengths = inspection.document_lengths(store)
    shown = as_json(store, lengths, largest)
    show(console, store, shown)
    console.lines(histogram_lines(shown["histogram"], console.width))
    if tokenizer is not None and texts:
        shown["texts"] = list(sample_texts(store, tokenizer, texts))
        for one in shown["texts"]:
            text = fmt.one_line(one["text"]) or "(empty)"
            console.header([("text", f"document {one['document']:,} · {plural(one['tokens'], 'token')} · {text}")])
    if picture is not None:
        try:
            plot.save(draw_lengths(shown["histogram"], lengths.median, fmt.one_line(prefix.name, LONGEST)), picture)
        except OSError as error:
            raise Mistake(f"--plot {picture} cannot be written ({error.strerror}) → name a file in a folder that exists") from None
        console.header([("drawn", short_path(picture))])
    return shown


def as_json(store: TokenStore, lengths: Lengths, largest: int) -> dict[str, Any]:
    """Everything about the store but its texts. What PREFIX.json does not say is None."""
    spread = {"min": int(lengths.values[0]), "median": lengths.median, "mean": store.num_tokens / store.num_documents}
    histogram = [{"from": fewest, "to": most, "documents": documents} for fewest, most, documents in lengths.histogram()]
    return {
        **{"prefix": str(store.prefix), "documents": store.num_documents, "tokens": store.num_tokens, "bytes": _fact(store, "bytes")},
        **{"type": store.tokens.dtype.name, "largest_id": largest},
        **{name: _text(store, name) for name in ("source", "source_sha256", "tokenizer", "tokenizer_sha256")},
        **{"tokens_per_document": {**spread, "max": int(lengths.values[-1])}, "histogram": histogram},
    }


def show(console: Console, store: TokenStore, shown: dict[str, Any]) -> None:
    """Prints the sizes, the ids and where they come from."""
    num_bytes = shown["bytes"]
    per_token = f"{num_bytes:,} bytes of text, {num_bytes / store.num_tokens:.2f} per token" if num_bytes is not None else ""
    sidecar = file_of(store.prefix, ".json").name
    unknown = f"bytes of text are not known: there is no {sidecar}, or not of this store"
    made_with, source = (_with_sha256(shown, name) for name in ("tokenizer", "source"))
    console.header(
        [
            ("", f"{fmt.one_line(str(store.prefix), LONGEST)} · token store"),
            ("size", f"{plural(store.num_documents, 'document')} · {plural(store.num_tokens, 'token')} · {per_token or unknown}"),
            ("ids", f"{shown['type']} · the largest is {shown['largest_id']:,} · tokenizer {made_with}"),
            ("source", source),
            ("lengths", f"{spread_line(shown['tokens_per_document'])} tokens per document"),
        ]
    )


def spread_line(spread: dict[str, float]) -> str:
    """'min 3 · median 41.5 · mean 50.2 · max 200'."""
    return f"min {spread['min']:,} · median {spread['median']:,.10g} · mean {spread['mean']:,.1f} · max {spread['max']:,}"


def histogram_lines(histogram: Sequence[dict[str, int]], width: int) -> Iterator[str]:
    """The histogram as text: one line for each power of two, with a bar."""
    labels = [f"{bar['from']:,}" if bar["from"] == bar["to"] else f"{bar['from']:,}–{bar['to']:,}" for bar in histogram]
    counts = [f"{bar['documents']:,}" for bar in histogram]
    first, second = max(map(len, ["tokens", *labels])), max(map(len, ["documents", *counts]))
    room = max(8, min(BAR, width - first - second - 4))
    most = max(bar["documents"] for bar in histogram)
    yield ""
    yield f"{'tokens':>{first}}  {'documents':>{second}}"
    for label, documents, bar in zip(labels, counts, histogram, strict=True):
        yield f"{label:>{first}}  {documents:>{second}}  {bar_of(bar['documents'] / most * room)}".rstrip()


def bar_of(columns: float) -> str:
    """A bar of so many columns, in eighths of one where the output can write them; anything above 0 has at least the smallest part."""
    if not encodes_unicode(sys.stdout):
        return "#" * -int(-columns // 1)
    eighths = max(round(columns * 8), int(columns > 0))
    return EIGHTHS[-1] * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def draw_lengths(histogram: Sequence[dict[str, int]], median: float, title: str) -> Any:
    """A matplotlib figure of the histogram over a logarithmic axis, with the median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges = [float(bar["from"]) for bar in histogram] + [histogram[-1]["to"] + 1.0]
    axis = [_place(edge) for edge in edges]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained", facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=LIGHT.text, parse_math=False)
    axes = figure.add_subplot()
    axes.bar(
        axis[:-1],
        [bar["documents"] for bar in histogram],
        [right - left for left, right in zip(axis, axis[1:], strict=False)],
        align="edge",
        color=LIGHT.runs[0],
        edgecolor=LIGHT.background,
    )
    if median >= 1:
        axes.axvline(_place(median), color=LIGHT.runs[1], linestyle="--", linewidth=1.2)
        label = f" median {median:,.10g}"
        axes.text(_place(median), 1.01, label, transform=axes.get_xaxis_transform(), color=LIGHT.runs[1], fontsize=9, ha="center")
    plot.style_axes(axes, "tokens per document", "documents", LIGHT)
    every = -(-len(axis) // MOST_TICKS)
    axes.set_xticks(axis[::every], [f"{edge:,.0f}" if edge < 10**6 else fmt.count(edge) for edge in edges[::every]])
    axes.set_xlim(axis[0], axis[-1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    return figure


def _place(tokens: float) -> float:
    """Where a length stands on the axis: its logarithm; documents without a token have a bar of the same width as those of one."""
    return math.log2(tokens) if tokens >= 1 else -1.0


def read_largest_id(store: TokenStore) -> int:
    """The largest id of a store whose sidecar does not tell. Standard error shows the reading of a large one."""
    shown = Console(sys.stderr, quiet=store.tokens.nbytes <= LONG)
    with shown.progress(f"reading {store.prefix.name} for its largest id ({megabytes(store.tokens.nbytes)})"):
        return int(store.read()["max_id"])


def sample_texts(store: TokenStore, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
    """The beginnings of the texts of `count` documents."""
    for document in inspection.evenly_spaced(store, count):
        start, stop = (int(offset) for offset in store.document_offsets(document, document + 1))
        text = inspection.beginning(store, Extract(document, 0, start, stop - start), tokenizer, CHARACTERS)
        yield {"document": document, "tokens": stop - start, "text": text}


def find_tokenizer(store: TokenStore, named: str | None, largest: int) -> Tokenizer:
    """The tokenizer that decodes the store: the named one, else the file beside it, else a built-in one that its sidecar names.

    A Mistake if there is none, or if it is not the one that the store was made with.
    """
    beside = inspection.tokenizer_beside(store) if named is None else None
    made_with, sha256 = _text(store, "tokenizer"), _text(store, "tokenizer_sha256")
    if beside is not None:  # nobody has named it
        named = str(beside)
        try_tokenizer(named, Path(), "name another one with --tokenizer, or leave --texts out")
    elif named is None and made_with in FIXED:  # a file that the sidecar names is not read: it may be a stranger's
        named = made_with
    if named is None:
        known = f" ({made_with:.{LONGEST}})" if made_with else ""
        raise Mistake(
            f"--texts needs the tokenizer that {store.prefix} was made with{known}, and no {tokenizer_file.FILE} lies beside it → "
            f"add --tokenizer with the path of a {tokenizer_file.FILE}, or {GPT2}"
        )
    tokenizer = load_tokenizer(store, named)
    fingerprints = [tokenizer.fingerprint]
    if tokenizer_file.is_file(named):
        fingerprints.append(inspection.sha256_of_tokenizer(user_path(Path(), named)))
    if sha256 is not None and sha256 not in fingerprints:
        raise Mistake(
            f"{store.prefix} was made with the tokenizer {made_with or '?'} (SHA-256 {sha256[:16]}), {named} is another "
            f"(SHA-256 {tokenizer.fingerprint[:16]}) → name that one with --tokenizer"
        )
    if largest >= tokenizer.vocab_size:
        raise Mistake(
            f"the largest id of {store.prefix} is {largest}, and the tokenizer {named} has {tokenizer.vocab_size} tokens → name the one "
            "that the store was made with"
        )
    return tokenizer


def load_tokenizer(store: TokenStore, name: str) -> Tokenizer:
    """A tokenizer.json, or a built-in tokenizer that is not made from a text. Relative paths start at the working directory."""
    if is_made_from_text(name):
        raise Mistake(
            f"--tokenizer {name} is made from a text, which a token store does not hold → name its {tokenizer_file.FILE}: data.cache has it"
        )
    if tokenizer_file.is_file(name):
        return tokenizer_file.load(name, Path())
    declared_vocab_size(name)  # a name that is not known is a Mistake
    text = f"{STORE}{store.prefix}"
    return run_tokenizer.load_tokenizer(Data(train=text, validation=text, tokenizer=name), ROOT)


def _fact(store: TokenStore, name: str) -> int | None:
    """A number of the sidecar; None if it has none of that name."""
    value = store.facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _text(store: TokenStore, name: str) -> str | None:
    """A text of the sidecar; None if it has none of that name."""
    value = store.facts.get(name)
    return value if isinstance(value, str) and value else None


def _with_sha256(shown: dict[str, Any], name: str) -> str:
    """'builtin:gpt2 (SHA-256 0123456789abcdef)', as far as it is known."""
    if shown[name] is None:
        return "not known"
    sha256 = shown[f"{name}_sha256"]
    return fmt.one_line(shown[name], LONGEST) + (f" (SHA-256 {fmt.one_line(sha256[:16])})" if sha256 else "")
