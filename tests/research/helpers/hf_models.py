"""Small models of all families as transformers writes them to a folder, with a tokenizer, and what an import makes of them."""

import copy
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from research.cli import import_
from research.data import documents
from research.tracking.run_folder import RunFolder
from tests.research.helpers.launches import ROOT

VOCAB, LENGTH = 331, 64
"""A vocabulary that no tensor degree divides, larger than the tokenizer's."""
IDS = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
NEOX = dict(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, max_position_embeddings=LENGTH, **IDS
)  # fmt: skip
LLAMA = dict(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
    max_position_embeddings=LENGTH, **IDS,
)  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "gpt2": GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=LENGTH, **IDS),
    "gpt2, untied, n_inner": GPT2Config(n_layer=1, n_embd=32, n_head=4, n_inner=40, n_positions=LENGTH, tie_word_embeddings=False, **IDS),
    "pythia": GPTNeoXConfig(**NEOX),
    "neox, sequential, tied, scaled": GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0},
    ),
    "llama, grouped": LlamaConfig(**LLAMA),
    "llama 3, tied": LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=LLAMA_3),
    "llama, one kv head, biases": LlamaConfig(
        **LLAMA | dict(num_key_value_heads=1), attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "llama, biases of attention": LlamaConfig(**LLAMA, attention_bias=True),
    "neox, no biases of attention": GPTNeoXConfig(**NEOX, attention_bias=False),
    "mistral, odd width": MistralConfig(**LLAMA | dict(hidden_size=36, head_dim=6), sliding_window=LENGTH),
    "qwen2": Qwen2Config(**LLAMA, head_dim=8),
    "qwen3, one kv head, wide": Qwen3Config(**LLAMA | dict(num_key_value_heads=1, head_dim=16), tie_word_embeddings=True),
}  # fmt: skip


def their_model(case: str) -> transformers.PreTrainedModel:
    """Random weights, norms about one and biases far from zero: an initialised model would hide a lost bias."""
    config = copy.deepcopy(CASES[case])  # a model writes its dtype into it
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=g) / (parameter.dim() or 1))
    return model.eval()


def their_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens whose first one ends a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([next(documents.documents("builtin:state_of_the_union/val", ROOT))[:5000]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


def their_folder(folder: Path, case: str, dtype: torch.dtype = torch.float32, **save) -> Path:
    """The model and the tokenizer as transformers saves them."""
    their_model(case).to(dtype).save_pretrained(folder, **save)
    their_tokenizer().save_pretrained(folder)
    return folder


def tree(place: Path) -> Path:
    """A tree with our packages and one experiment, into which an import can be made."""
    folder = place / "tree"
    (folder / "experiments" / "gpt_sotu").mkdir(parents=True)
    for package in ("research", "models", "parallel"):
        (folder / package).symlink_to(ROOT / package)
    for name in ("launch.py", "config.py"):
        (folder / "experiments" / "gpt_sotu" / name).write_bytes((ROOT / "experiments" / "gpt_sotu" / name).read_bytes())
    return folder


def imported(model: Path, place: Path, name: str, *more: str) -> RunFolder:
    """The run that an import of `model` makes in `place`/runs; the experiment lies in `place`/tree."""
    where = place / "tree" if (place / "tree").is_dir() else tree(place)
    import_.main([str(model), "--as", str(where / "experiments" / name), "--runs", str(place / "runs"), *more])
    (run,) = (path for path in (place / "runs" / name).iterdir() if not path.is_symlink())
    return RunFolder(run)
