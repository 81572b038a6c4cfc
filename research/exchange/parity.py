"""The parity certificate: the same text through transformers' model and through ours, logit by logit."""
# MERGED-DOC """The two models that a certificate compares, each as a function ids → logits: transformers' own reading of the files, and ours."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import gpt
from models.config import GPT
from models.conversion.write_config import ARCHITECTURES
from parallel.checkpoint.reader import Reader, load_weights
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research.data import documents
from research.data.tokenizer import Tokenizer
from research.generation.restore import without_init
from research.tracking.console import Advance, counted, nothing

TEXT = "builtin:state_of_the_union/val"
TOKENS, WINDOW = 512, 256
"""How much of the text, and how much at a time: two lists of logits of 512 × 128 k take 0.5 GB."""
BOUND = 1e-4
"""Of the largest difference of a logit over the largest logit, both models in fp32 on the CPU.

Rounding alone leaves 1e-7 to 1e-5; an epsilon of 1e-6 for 1e-5 leaves 4e-4, another activation or rotation 1e-1 (docs/exchange.md).
"""

Logits = Callable[[Tensor], Tensor]
"""ids 'b s' -> logits 'b s v'."""


@dataclass(frozen=True)
class Certificate:
    """What the comparison found."""

    tokens: int
    largest_difference: float
    """Of a logit, over all tokens and the whole vocabulary."""
    largest_logit: float
    kl: float
    """Mean Kullback–Leibler divergence of our next token's distribution from theirs, nats, computed in fp64."""
    perplexity_theirs: float
    perplexity_ours: float
    bound: float = BOUND

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit; infinite where either is not finite."""
        found = self.largest_difference / max(self.largest_logit, 1e-30)
        return found if math.isfinite(found) else math.inf

    @property
    def passed(self) -> bool:
        """Whether the two are the same but for rounding."""
        return self.relative <= self.bound

    def line(self) -> str:
        """As a person reads it."""
        difference = f"largest difference of a logit {self.largest_difference:.1e} of {self.largest_logit:.3g} = {self.relative:.1e}"
        verdict = "passed" if self.passed else "FAILED"
        perplexities = f"perplexity {self.perplexity_theirs:.5g} theirs, {self.perplexity_ours:.5g} ours"
        return f"{verdict} · {difference} (bound {self.bound:.0e}) · KL {self.kl:.1e} · {perplexities} · {self.tokens} tokens"

    def table(self) -> dict[str, Any]:
        """For certificate.json."""
        numbers = {name: _json(value) for name, value in asdict(self).items()}
        return numbers | {"relative": _json(self.relative), "passed": self.passed, "text": TEXT}


def sample_ids(tokenizer: Tokenizer, length: int) -> Tensor:
    """The fixed text's first TOKENS tokens as windows 'b s' of at most WINDOW and of what the model reads."""
    window = min(length, WINDOW)
    wanted, ids = max(window, TOKENS // window * window), []
    for document in documents.documents(TEXT, Path()):
        ids += tokenizer.encode(document[: 20 * TOKENS])
        if len(ids) >= wanted:
            break
    return torch.tensor(ids[: len(ids[:wanted]) // window * window]).view(-1, window)


def certify(ids: Tensor, theirs: Callable[[], Logits], ours: Callable[[], Logits], advance: Advance = nothing) -> Certificate:
    """The certificate for ids 'b s'. The models are made one after the other: only one is in memory at a time.

    `advance` is called with 1 for each window and model.
    """
    expected = list(counted(_all_logits(theirs, ids), advance))
    found = counted(_all_logits(ours, ids), advance)
    sums = [compared(their, our, row) for their, our, row in zip(expected, found, ids, strict=True)]
    difference, logit, kl, their_nats, our_nats = (torch.tensor(column, dtype=torch.float64) for column in zip(*sums, strict=True))
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    return Certificate(
        tokens=ids.numel(),
        largest_difference=float(difference.max()),
        largest_logit=float(logit.max()),
        kl=float(kl.sum() / ids.numel()),
        perplexity_theirs=_exp(float(their_nats.sum() / max(predicted, 1))),
        perplexity_ours=_exp(float(our_nats.sum() / max(predicted, 1))),
    )


def _json(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else repr(value)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


@torch.no_grad()
def _all_logits(make: Callable[[], Logits], ids: Tensor) -> Iterator[Tensor]:
    model = make()
    for row in ids:
        yield model(row[None])[0].float()


def compared(theirs: Tensor, ours: Tensor, ids: Tensor) -> tuple[float, float, float, float, float]:
    """Of one window, logits 's v': largest difference, largest logit, Σ KL, Σ nats of theirs and of ours on the tokens that follow.

    A NaN or an infinity anywhere is a difference without bound.
    """
    if theirs.shape != ours.shape:
        raise Mistake(f"transformers' model has {theirs.shape[-1]} logits, ours {ours.shape[-1]} → is vocab_size the table's height?")
    p, q = F.log_softmax(theirs.double(), -1), F.log_softmax(ours.double(), -1)
    difference = torch.nan_to_num((theirs - ours).abs(), nan=math.inf, posinf=math.inf).max()
    nats = (-logs[:-1].gather(1, ids[1:, None]).sum() for logs in (p, q))
    return (float(difference), float(theirs.abs().max()), float((p.exp() * (p - q)).sum()), *map(float, nats))  # type: ignore[return-value]


SAFELY = {
    "dtype": torch.float32,
    "attn_implementation": "eager",
    "local_files_only": True,
    "use_safetensors": True,
    "trust_remote_code": False,
}


def our_logits(model: GPT, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Logits:
    """Our model with a checkpoint's weights, rounded to `dtype` first, computing in fp32."""
    model, variants = without_init(model, {})
    module = PlainModule(gpt.layers(model, Grid(), seed=0, variants=variants))
    with Reader(checkpoint) as reader:
        load_weights(module, reader, Grid())
    with torch.no_grad():
        for _, parameter in unique_parameters(module):
            parameter.copy_(parameter.to(dtype))
    return module.eval()


def their_logits(folder: Path, family: str) -> Logits:
    """transformers' own reading of a folder's config.json and safetensors, computing in fp32. Never code from the folder."""
    import transformers

    kind = getattr(transformers, ARCHITECTURES[family])
    return _asked(lambda: kind.from_pretrained(folder, **SAFELY), folder)


def their_auto_logits(folder: Path) -> Logits:
    """The same as a user loads it, by the folder alone."""
    import transformers

    return _asked(lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, **SAFELY), folder)


def their_gguf_logits(path: Path, config: dict[str, Any]) -> Logits:
    """transformers' own reading of a GGUF file's tensors, in its Llama of a configuration."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    def load() -> nn.Module:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "attn_implementation": "eager"}))
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        missing, unknown = model.load_state_dict(tensors, strict=False)
        if unknown or set(missing) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set()):
            raise ValueError(f"it lacks {missing[:1]}, or has {unknown[:1]} too much")
        return model

    return _asked(load, path)


def _asked(load: Callable[[], Any], path: Path) -> Logits:
    with quiet_transformers():
        try:
            model = load().eval()
        except Exception as error:
            raise Mistake(
                f"transformers cannot read {path} ({type(error).__name__}: {' '.join(str(error).split())[:160]}) → fetch it again"
            ) from None
    return lambda ids: model(ids, use_cache=False).logits


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice while it loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
