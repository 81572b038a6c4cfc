"""Checks of a model with classes of a variant.py: are its logits causal, and does a KV cache give the logits of a whole pass?

Such classes may compute anything, so the model is tried on random tokens, over the whole context that will be used. Both checks
run in at least fp32, whatever the precision of the model, so that rounding is far below what they look for. They are collective
over the tensor ranks, on each of which they end alike, because gathered logits are equal there.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.encoder_config import AnyModel
from models.inference.cache import remove_cache
from models.inference.sequences import CachedSequences
from parallel.collectives import gather_from_tensor_ranks
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule

TOLERANCE = 1e-4
"""Largest allowed difference of a logit, relative to the largest logit of the same token."""
ROWS = 8
"""Rows of the trial's cache, whatever number of rows the decoder will have. Each is tried on its part of the context, so that the
number of steps, which are sequential, is an eighth of the context."""
CHUNK = 1024
"""The number of positions whose logits are held at once."""


class UnusableLogits(Mistake):
    """A model with classes of a variant.py cannot be evaluated or sampled from: it can still be trained."""


def full_logits(module: PlainModule, model: AnyModel, grid: Grid, x: Tensor) -> Tensor:
    """'n d' -> 'n v', at least fp32, of the whole vocabulary, gathered over the tensor ranks."""
    logits = gather_from_tensor_ranks(module.logits(x[:, None])[:, 0], grid.tensor_group)[:, : model.vocab_size]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def trial_ids(model: AnyModel, length: int, seed: int = 0) -> list[int]:
    """Random ids, equal on every rank."""
    return torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def shorter_lengths(length: int) -> list[int]:
    """The lengths of the texts that one of `length` tokens is compared with."""
    return sorted({1, 2, length // 2, length - 1} & set(range(1, length)))


def refuse_dependent_logits(module: PlainModule, model: AnyModel, grid: Grid, length: int) -> None:
    """A Mistake if the logits of a token depend on anything but the tokens before it: on later ones, their number, or other rows.

    A text of `length` tokens is compared with its beginnings, each of which is read together with another text. A Mistake too if
    the classes raise on one of them.
    """
    with _at_least_fp32(module), torch.inference_mode():
        device = next(module.parameters()).device
        ids, others = (torch.tensor([trial_ids(model, length, seed)], device=device) for seed in (0, 1))
        with errors_of_variants(length):
            whole = module.hidden(ids)[0]
        for shorter in shorter_lengths(length):
            with errors_of_variants(shorter):
                found = module.hidden(torch.cat([ids, others])[:, :shorter])[0]
            pairs = zip(found.split(CHUNK), whole[:shorter].split(CHUNK), strict=True)
            errors = torch.cat([difference(*(full_logits(module, model, grid, x) for x in pair)) for pair in pairs])
            refuse_different(errors, shorter, length)


@contextlib.contextmanager
def errors_of_variants(length: int, *passing: type[Exception]) -> Iterator[None]:
    """Makes what classes of a variant.py raise for a text of `length` tokens a Mistake. `passing` are errors that are not theirs."""
    try:
        yield
    except (torch.OutOfMemoryError, Mistake, *passing):
        raise  # one rank alone may have run out of memory
    except Exception as error:  # on every rank alike, because all compute the same text
        tokens = f"{length} token" + "s" * (length != 1)
        raise UnusableLogits(
            f"classes of variant.py cannot compute a text of {tokens} ({problem(error)}) → let them take texts of every length up to "
            "model.seq_length, because evaluation and generation read short ones too"
        ) from error


def problem(error: Exception) -> str:
    """'ValueError: a table of 9 places does not fit', on one line and not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def refuse_different(errors: Tensor, shorter: int, length: int, tolerance: float = TOLERANCE) -> None:
    """A Mistake if the error of a token is above the tolerance. `errors` 's' compares a text of `length` tokens with its beginning."""
    if (errors > tolerance).any():  # not if they are NaN, which generation reports itself
        token = int((errors > tolerance).nonzero()[0])
        raise UnusableLogits(
            f"token {token + 1} of a text gets other logits among {length} tokens than among {shorter} (off by {float(errors[token]):.1g} "
            "of the largest) → let classes of variant.py depend only on the tokens up to each position: on no later ones, not on how many "
            "there are, and on no other text of the batch"
        )


def why_uncached(module: PlainModule, model: AnyModel, grid: Grid, length: int) -> str | None:
    """None if every position of `length` gets the logits of a whole pass when it is decoded with a KV cache; else what is different."""
    with _at_least_fp32(module), torch.inference_mode():
        ids = trial_ids(model, length)
        whole = module.hidden(torch.tensor([ids], device=next(module.parameters()).device))[0]
        sequences = CachedSequences(module, model, grid, min(ROWS, length), length)
        try:
            errors = _cached_errors(sequences, model, grid, ids, whole)
        except torch.OutOfMemoryError:
            raise  # one rank alone may have run out of memory
        except Exception as error:  # what a variant's class raises when it gets one token, on every rank alike
            return f"classes of variant.py cannot compute one token at a time ({problem(error)})"
        finally:
            remove_cache(module)
    wrong = (~(errors <= TOLERANCE)).nonzero()
    if not len(wrong):
        return None
    token = int(wrong[0])
    return (
        "classes of variant.py compute other logits a token at a time than at once "
        f"(token {token + 1} of {length} is off by {float(errors[token]):.1g} of the largest)"
    )


def _cached_errors(sequences: CachedSequences, model: AnyModel, grid: Grid, ids: Sequence[int], whole: Tensor) -> Tensor:
    """'s': the difference of each token's logits from those of a whole pass with hidden states `whole`.

    Row i reads the tokens before its part of the context at once, and those of its part one at a time.
    """
    errors, size = torch.zeros(len(ids), dtype=torch.float64), -(-(len(ids) - 1) // sequences.rows.slots) or 1

    def compare(x: Tensor, positions: list[int]) -> None:
        pair = (full_logits(sequences.module, model, grid, x), full_logits(sequences.module, model, grid, whole[positions]))
        errors[positions] = torch.maximum(errors[positions], difference(*pair).double().cpu())  # maximum keeps NaN

    for first in range(1, len(ids), size):
        compare(sequences.admit([ids[:first]]), [first - 1])
    for _ in range(size):
        if sequences.lengths and sequences.lengths[-1] == len(ids):
            sequences.drop(len(sequences.lengths) - 1)  # the last part may be shorter
        if positions := list(sequences.lengths):
            compare(sequences.step([ids[position] for position in positions]), positions)
    return errors


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """'n v', 'n v' -> 'n': the largest difference of a logit, relative to the largest expected one. NaN if a logit is NaN."""
    error = (found - expected).abs().amax(-1)
    return torch.where(error == 0, error, error / expected.abs().amax(-1))


@contextlib.contextmanager
def _at_least_fp32(module: PlainModule) -> Iterator[None]:
    """Makes the module's parameters and buffers at least fp32. Each returns to its own precision without a change of a value."""
    own = [(tensor, tensor.dtype) for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    for tensor, dtype in own:
        tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        for tensor, dtype in own:
            tensor.data = tensor.data.to(dtype)
