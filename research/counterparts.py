"""The two models that a certificate compares, each as a function ids → logits: transformers' own reading of the files, and ours."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import gpt
from models.config import GPT
from models.hf_config import ARCHITECTURES
from parallel.checkpoint_reader import Reader, load_weights
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from research.parity import Logits
from research.restore import UNDRAWN, undrawn

SAFELY = {
    "dtype": torch.float32,
    "attn_implementation": "eager",
    "local_files_only": True,
    "use_safetensors": True,
    "trust_remote_code": False,
}


def our_logits(model: GPT, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Logits:
    """Our model with a checkpoint's weights, rounded to `dtype` first, computing in fp32."""
    module = PlainModule(gpt.layers(undrawn(model), Grid(), seed=0, variants=UNDRAWN))
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
