"""Reading training samples: our sampler beside a nanoGPT-style reader and Hugging Face's datasets, in samples per CPU second.

    python benchmarks/data.py [--tokens 20000000] [--micro_batch 8] [--repetitions 21] [--sources 100]

Writes a store of tokens (uint16) to a temporary folder: the documents of the built-in text with GPT-2's tokenizer, again and again. Each
reader takes micro-batches of ids and targets in int64 as torch tensors, at random places of the store:

    ours      StreamSampler over the store, as training calls it: order, windows, weights
    nanoGPT   np.memmap; for each sample two slices, .astype(np.int64), torch.from_numpy, torch.stack, as its get_batch does, but the
              file is opened once and not for each micro-batch
    fim, fim rate 1, spans, masked
              ExampleSampler over the classes of docs/samples.md: fim with rate and spm_rate 0.5, spans and masked with 15 %
    packed, supervised, pairs
              the same of whole documents of 48 tokens: the second half of each is a response, or the target of a pair
    datasets  a Dataset of rows of seq_length + 1 tokens, format "torch", indexed with random rows (left out if it is not installed)

The file lies in the page cache and every page of both memory maps has been touched, so that neither reader waits for the disk or the
first fault of a page. The readers take turns of 1,024 samples, so that a machine whose speed drifts slows all of them; each is measured in
CPU seconds of this process, one thread. The first two turns of each are not counted. A ratio is the median over the turns, with the
middle half of them in brackets. The last lines are what a blend of --sources stores of equal weights costs more per sample than one store.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from parallel.engines.micro_batch import MicroBatch
from research import ROOT
from research.cli.verbs import count
from research.cluster.exit_codes import refusing
from research.config.batch_sizes import BatchSizes
from research.config.examples import ExampleSettings, FillInMiddle, Masked, Pairs, Spans, Supervised
from research.data import documents, tokenizer
from research.data.batches import Sampler, StreamSampler, one_source
from research.data.blend import Blend, Stage
from research.data.examples import Examples, ExampleSampler
from research.data.fill_in_middle import FillInMiddleExamples
from research.data.mask_store import MaskWriter
from research.data.masked_lm import MaskedExamples
from research.data.packing import PackedDocuments
from research.data.pairs import JoinedPairs
from research.data.span_corruption import SpanExamples
from research.data.special_tokens import SEPARATOR
from research.data.supervised import SupervisedExamples
from research.data.token_store import StoreWriter, TokenStore, write
from research.data.tokenizer import Tokenizer

LENGTHS = (128, 1024)
TOKENIZER = "builtin:gpt2+fim+spans+mask+sep"
TEXT = "builtin:state_of_the_union/train"
HALVES = 48
"""Tokens of the documents with two halves."""
SAMPLES = 1024
"""Samples of a turn."""
NOT_COUNTED = 2
"""Turns of each reader before those that are measured."""
Reader = Callable[[int], object]
"""Reads the micro-batch of this number."""


def store_of(folder: Path, name: str, texts: list[np.ndarray], tokens: int, own: Tokenizer) -> TokenStore:
    """A store of documents, again and again, up to so many tokens or a document more."""
    each = [len(text) for text in texts]
    count = next(i for i, total in enumerate(itertools.accumulate(itertools.cycle(each)), 1) if total >= tokens)
    write(folder / name, ((text, len(text)) for text in itertools.islice(itertools.cycle(texts), count)), own.vocab_size, {})
    return TokenStore(folder / name)


def of_examples(made: type, store: TokenStore, own: Tokenizer, length: int, size: int, chosen: ExampleSettings | None) -> Reader:
    """The examples of a class, with these settings; of a T5, with source and target of `length` tokens."""
    options = {} if chosen is None else chosen.options
    more = {"source_length": length} if isinstance(chosen, Spans) else {}
    examples: Examples = made(store, own, length, 0, **options, **more)
    return of_sampler(ExampleSampler([examples], Blend([store.prefix.name], [Stage(0, (1.0,))], 0), BatchSizes(size), size, 0))


def store_of_halves(folder: Path, texts: list[np.ndarray], tokens: int, own: Tokenizer) -> TokenStore:
    """Documents of HALVES tokens: a half, the separator, the other half, end-of-text; and the mask of the second halves."""
    stream = np.concatenate(texts)
    stream = stream[stream < own.end_of_text]
    rows = np.resize(stream, (tokens // HALVES, HALVES)).astype(np.uint16)
    rows[:, HALVES // 2], rows[:, -1] = own.backend.token_to_id(SEPARATOR), own.end_of_text
    lengths, mask = np.full(len(rows), HALVES), np.zeros(rows.shape, np.uint8)
    mask[:, HALVES // 2 + 1 :] = 1
    with StoreWriter(folder / "halves", own.vocab_size, {}) as writer, MaskWriter(folder / "halves", writer.facts) as masks:
        writer.add_documents(rows.ravel(), lengths, int(lengths.sum()))
        masks.add_documents(mask.ravel(), lengths)
    return TokenStore(folder / "halves")


def of_sampler(sampler: Sampler) -> Reader:
    """One step of one micro-batch each, on one data rank."""

    def read(number: int) -> object:
        (batch,) = sampler.micro_batches(number, 0, 1)
        return MicroBatch.of(batch.ids, batch.labels, batch.context)

    return read


def of_nanogpt(store: TokenStore, length: int, size: int) -> Reader:
    """The reader of karpathy/nanoGPT's train.py, on the same file."""
    data = np.memmap(f"{store.prefix}.bin", dtype=np.uint16, mode="r")
    data.max()  # touches every page

    def read(number: int) -> object:
        starts = torch.randint(len(data) - length, (size,))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        return x, y

    return read


def of_datasets(store: TokenStore, length: int, size: int) -> Reader | None:
    """Rows of an Arrow table; None if `datasets` is not installed."""
    try:
        from datasets import Dataset
    except ImportError:
        return None
    rows = (store.num_tokens - 1) // (length + 1)
    table = np.asarray(store.tokens[: rows * (length + 1)]).reshape(rows, length + 1)
    dataset = Dataset.from_dict({"ids": table}).with_format("torch")
    generator = np.random.default_rng(0)

    def read(number: int) -> object:
        ids = dataset[generator.integers(0, rows, size).tolist()]["ids"].to(torch.int64)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return read


def microseconds(reader: Reader, first: int, times: int, size: int) -> float:
    """CPU time per sample."""
    begun = time.process_time()
    for number in range(first, first + times):
        reader(number)
    return (time.process_time() - begun) / times / size * 1e6


def measured(readers: dict[str, Reader], size: int, repetitions: int) -> dict[str, list[float]]:
    """Microseconds per sample of each reader in each repetition, in turns."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    times = max(1, SAMPLES // size)
    for repetition in range(NOT_COUNTED + repetitions):
        for name, reader in readers.items():
            taken = microseconds(reader, repetition * times, times, size)
            if repetition >= NOT_COUNTED:
                found[name].append(taken)
    return found


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=count, default=20_000_000)
    parser.add_argument("--micro_batch", type=count, default=8)
    parser.add_argument("--repetitions", type=count, default=21)
    parser.add_argument("--sources", type=count, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = arguments.micro_batch
    with tempfile.TemporaryDirectory() as folder:
        own = tokenizer.fixed(TOKENIZER)
        texts = [np.array([*own.encode(text), own.end_of_text]) for text in documents.documents(TEXT, ROOT)]
        store = store_of(Path(folder), "one", texts, arguments.tokens, own)
        parts = [store_of(Path(folder), f"part{i}", texts, arguments.tokens // arguments.sources, own) for i in range(arguments.sources)]
        names = [part.prefix.name for part in parts]
        halves = store_of_halves(Path(folder), texts, arguments.tokens, own)
        for each in (store, halves, *parts):
            each.tokens.max()  # touches every page
        for length in LENGTHS:
            blend = Blend(names, [Stage(0, (1.0,) * len(names))], 0)
            readers: dict[str, Reader | None] = {
                "ours": of_sampler(one_source(store, length, BatchSizes(size), size, 0)),
                "nanoGPT": of_nanogpt(store, length, size),
                "datasets": of_datasets(store, length, size),
                "blend": of_sampler(StreamSampler(parts, blend, length, BatchSizes(size), size, 0)),
                "fim": of_examples(FillInMiddleExamples, store, own, length, size, FillInMiddle(rate=0.5, spm_rate=0.5, confine=True)),
                "fim rate 1": of_examples(FillInMiddleExamples, store, own, length, size, FillInMiddle(rate=1, spm_rate=0.5, confine=True)),
                "spans": of_examples(SpanExamples, store, own, length, size, Spans(rate=0.15, mean_length=3)),
                "masked": of_examples(MaskedExamples, store, own, length, size, Masked(rate=0.15)),
                "packed": of_examples(PackedDocuments, halves, own, length, size, None),
                "supervised": of_examples(SupervisedExamples, halves, own, length, size, Supervised(train_on="responses")),
                "pairs": of_examples(JoinedPairs, halves, own, length, size, Pairs()),
            }
            found = measured({name: reader for name, reader in readers.items() if reader}, size, arguments.repetitions)
            print(f"seq_length {length}, micro-batches of {size}, {arguments.tokens:,} tokens")
            for name in found:
                ratios = [other / own for own, other in zip(found["ours"], found[name], strict=True)]
                lower, upper = np.quantile(ratios, (0.25, 0.75))
                spread = f"({lower:.1f} – {upper:.1f})"
                taken = statistics.median(found[name])
                rate = f"{taken:7.2f} µs per sample, {1e6 / taken:8,.0f} per second"
                print(f"  {name:<10} {rate}   {statistics.median(ratios):5.1f} × ours {spread}")
            more = statistics.median(blended - own for own, blended in zip(found["ours"], found["blend"], strict=True))
            print(f"  a blend of {len(parts)} sources costs {more:.2f} µs per sample more than one source")


if __name__ == "__main__":
    with refusing():
        main()
