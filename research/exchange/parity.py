"""The parity certificate: the same text through transformers' model and through ours, with the logits compared one by one."""

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import architectures
from models.conversion.write_config import ARCHITECTURES
from models.encoder_config import AnyModel
from parallel.checkpoint.reader import Reader, load_weights
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import Layer, PlainModule, unique_parameters
from research.data import documents
from research.data.tokenizer import Tokenizer, known_letters
from research.generation.restore import without_init
from research.tracking.console import Advance, counted, nothing
from research.tracking.metrics import finite

TEXT = "builtin:state_of_the_union/val"
TOKENS, WINDOW = 512, 256
"""Number of tokens that are compared, and of tokens per forward pass. Two sets of logits of 512 × 128 k numbers take 0.5 GB."""
BOUND = 1e-4
"""Largest difference of a logit, relative to the largest logit, that passes. Both models compute in fp32 on the CPU.

Rounding alone gives 1e-7 to 1e-5. A normalisation epsilon of 1e-6 instead of 1e-5 gives 4e-4, another activation or rotary embedding
1e-1 (docs/exchange.md).
"""

NEXT, OWN = 1, 0
"""How many places ahead of a place the token is that its logits predict: the next token, or the place's own."""
Logits = Callable[[Tensor], Tensor]
"""ids 'b s' -> logits 'b s v'."""
LOAD_OPTIONS = {
    "dtype": torch.float32,
    "attn_implementation": "eager",
    "local_files_only": True,
    "use_safetensors": True,
    "trust_remote_code": False,
}
"""Loads safetensors from the folder only, and never runs code from it."""
AUTO_CLASSES = {
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""The ending of a class's name -> the class of transformers that loads it. The others are loaded by AutoModelForCausalLM."""


@dataclass(frozen=True)
class Certificate:
    """The result of a comparison."""

    tokens: int
    largest_difference: float
    """Of a logit, over all tokens and the whole vocabulary."""
    largest_logit: float
    kl: float
    """Mean Kullback–Leibler divergence of our distribution of the next token from theirs, in nats, computed in fp64."""
    perplexity_theirs: float
    perplexity_ours: float
    bound: float = BOUND
    texts: int = 0
    """How many texts both models wrote (pair_parity.py)."""
    equal_texts: int = 0
    """How many of them are equal, token for token."""

    @property
    def relative(self) -> float:
        """The largest difference divided by the largest logit; infinite if either is not finite."""
        return relative(self.largest_difference, self.largest_logit)

    @property
    def passed(self) -> bool:
        """Whether the models differ by rounding only."""
        return self.relative <= self.bound and self.equal_texts == self.texts

    def line(self) -> str:
        """The certificate as one line for the terminal."""
        difference = f"largest difference of a logit {self.largest_difference:.1e} of {self.largest_logit:.3g} = {self.relative:.1e}"
        verdict = "passed" if self.passed else "FAILED"
        perplexities = f"perplexity {self.perplexity_theirs:.5g} theirs, {self.perplexity_ours:.5g} ours"
        texts = f" · {self.equal_texts} of {self.texts} texts equal" if self.texts else ""
        return f"{verdict} · {difference} (bound {self.bound:.0e}) · KL {self.kl:.1e} · {perplexities} · {self.tokens} tokens{texts}"

    def table(self) -> dict[str, Any]:
        """The content of certificate.json. Numbers that are not finite become strings, because JSON has none."""
        numbers = {name: value for name, value in asdict(self).items() if self.texts or not name.endswith("texts")}
        return finite(numbers | {"relative": self.relative}) | {"passed": self.passed, "text": TEXT}


def relative(difference: float, largest: float) -> float:
    """The difference divided by the largest value; infinite if either is not finite."""
    ratio = difference / max(largest, 1e-30)
    return ratio if math.isfinite(ratio) else math.inf


def sample_ids(tokenizer: Tokenizer, length: int) -> Tensor:
    """The first TOKENS tokens of the fixed text, as windows 'b s' of at most WINDOW tokens and of what the model reads."""
    window = min(length, WINDOW)
    wanted = max(window, TOKENS // window * window)
    ids = sample_texts(tokenizer, wanted)
    return torch.tensor(ids[: len(ids[:wanted]) // window * window]).view(-1, window)


def sample_texts(tokenizer: Tokenizer, wanted: int = TOKENS) -> list[int]:
    """`wanted` or more ids of the fixed text, or all that it has. Of a tokenizer of characters, of those that it knows."""
    ids: list[int] = []
    for document in documents.documents(TEXT, Path()):
        with without_panic_messages():
            ids += tokenizer.encode(known_letters(tokenizer.backend, document[: 20 * TOKENS]))
        if len(ids) >= wanted:
            break
    return ids or [i % tokenizer.vocab_size for i in range(wanted)]


@torch.no_grad()
def certify(
    ids: Tensor, theirs: Callable[[], Logits], ours: Callable[[], Logits], advance: Advance = nothing, ahead: int = NEXT
) -> Certificate:
    """Compares the two models on ids 'b s'. `theirs` and `ours` load a model each; only one is in memory at a time.

    `advance` is called with 1 for each window and model. `ahead`: NEXT for a GPT, OWN for a BERT. Logits may be of the last places of a
    window alone.
    """

    def logits_of_windows(load: Callable[[], Logits]) -> Iterator[Tensor]:
        model = load()
        for window in ids:
            yield model(window[None])[0].float()

    def perplexity(nats: Tensor) -> float:
        mean = float(nats.sum() / max(tokens - len(ids) * ahead, 1))
        return math.exp(mean) if mean < 700 else math.inf

    expected = list(counted(logits_of_windows(theirs), advance))
    tokens = sum(map(len, expected))
    actual = counted(logits_of_windows(ours), advance)
    rows = [_compare(their, our, window, ahead) for their, our, window in zip(expected, actual, ids, strict=True)]
    difference, logit, kl, their_nats, our_nats = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return Certificate(
        tokens=tokens,
        largest_difference=float(difference.max()),
        largest_logit=float(logit.max()),
        kl=float(kl.sum() / tokens),
        perplexity_theirs=perplexity(their_nats),
        perplexity_ours=perplexity(our_nats),
    )


def _compare(theirs: Tensor, ours: Tensor, ids: Tensor, ahead: int) -> tuple[float, float, float, float, float]:
    """Compares logits 's v' of one window.

    Returns the largest difference, the largest logit, the sum of the KL divergences, and the sum of the nats of the tokens
    `ahead` places further, theirs and ours. If a logit is NaN or infinite, the difference is infinite.
    """
    if theirs.shape != ours.shape:
        raise Mistake(f"transformers' model has {theirs.shape[-1]} logits, ours {ours.shape[-1]} → is vocab_size the table's height?")
    ids = ids[len(ids) - len(theirs) :]
    p, q = F.log_softmax(theirs.double(), -1), F.log_softmax(ours.double(), -1)
    difference = torch.nan_to_num((theirs - ours).abs(), nan=math.inf, posinf=math.inf).max()
    nats = (-logs[: len(ids) - ahead].gather(1, ids[ahead:, None]).sum() for logs in (p, q))
    return (float(difference), float(theirs.abs().max()), float((p.exp() * (p - q)).sum()), *map(float, nats))  # type: ignore[return-value]


def our_model(model: AnyModel, checkpoint: Path, dtype: torch.dtype = torch.float32, context: tuple[str, ...] = ()) -> PlainModule:
    """Our model in fp32 with the weights of a checkpoint, which are rounded to `dtype` first. It reads the tensors of `context`."""
    model, variants = without_init(model, {})
    return read_module(architectures.layers(model, Grid(), seed=0, variants=variants, context=context), checkpoint, dtype)


def our_logits(model: AnyModel, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Logits:
    """Our model's logits, as in `our_model`."""
    module = our_model(model, checkpoint, dtype)

    def logits(ids: Tensor) -> Tensor:
        output = module(ids)
        return output if isinstance(output, Tensor) else output[0]  # a BERT's sentence logits follow its others

    return logits


def read_module(layers: Sequence[Layer], checkpoint: Path, dtype: torch.dtype = torch.float32) -> PlainModule:
    """The layers in fp32 with the weights of a checkpoint, which are rounded to `dtype` first."""
    module = PlainModule(layers)
    with Reader(checkpoint) as reader:
        load_weights(module, reader, Grid())
    with torch.no_grad():
        for _, parameter in unique_parameters(module):
            parameter.copy_(parameter.to(dtype))
    return module.eval()


def logits_of(model: nn.Module) -> Logits:
    """Those of a model of transformers."""
    return lambda ids: model(ids)[0]


def their_logits(folder: Path, family: str, shown: Path | None = None, classes: Mapping[str, str] = ARCHITECTURES) -> Logits:
    """Those of `their_model`. Of a class without heads, what is returned gives hidden states."""
    return logits_of(their_model(folder, family, shown, classes))


def their_model(folder: Path, family: str, shown: Path | None = None, classes: Mapping[str, str] = ARCHITECTURES) -> nn.Module:
    """transformers' model of a folder in fp32, loaded by the class of `family`. `shown`: the path that an error names instead.

    `classes`: family -> its class. A class without heads gives hidden states.
    """
    import transformers

    architecture = getattr(transformers, classes[family])
    return _load(lambda: architecture.from_pretrained(folder, **LOAD_OPTIONS), folder, shown)


def their_auto_logits(folder: Path) -> Logits:
    """Those of `their_auto_model`."""
    return logits_of(their_auto_model(folder))


def their_auto_model(folder: Path) -> nn.Module:
    """transformers' model of a folder in fp32, loaded by the class that the folder names, as a user loads it."""
    import transformers

    def make() -> nn.Module:
        names = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).architectures or [""]
        auto = next((auto for ending, auto in AUTO_CLASSES.items() if names[0].endswith(ending)), "AutoModelForCausalLM")
        return getattr(transformers, auto).from_pretrained(folder, **LOAD_OPTIONS)

    return _load(make, folder)


def their_gguf_logits(path: Path, config: dict[str, Any]) -> Logits:
    """transformers' model of a configuration, with the tensors that transformers reads from a GGUF file."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    def make() -> nn.Module:
        settings = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager", dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        missing, unknown = model.load_state_dict(tensors, strict=False)
        if unknown or set(missing) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set()):
            raise ValueError(f"it lacks {missing[:1]}, or has {unknown[:1]} too much")
        return model

    return logits_of(_load(make, path))


def _load(make: Callable[[], Any], path: Path, shown: Path | None = None) -> nn.Module:
    """Makes a model of transformers; whatever it raises becomes a Mistake about `path`, or about `shown` in its place."""
    with quiet_transformers():
        try:
            model = make().eval()
        except Exception as error:
            said = " ".join(str(error).split()).replace(str(path), str(shown or path))[:160]
            raise Mistake(f"transformers cannot read {shown or path} ({type(error).__name__}: {said}) → fetch it again") from None
    model.config.use_cache = False  # a BERT's call takes no such argument
    return model


@contextlib.contextmanager
def without_panic_messages() -> Iterator[None]:
    """Discards what is written to the file descriptor of standard error: Rust reports a panic there before it becomes an error here."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses the progress bars and warnings of transformers."""
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
