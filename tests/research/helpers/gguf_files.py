"""GGUF files as llama.cpp's converter writes them, by its own writer: a small model with a tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import torch

from research.data import documents
from tests.models.conversion.test_gguf import converted
from tests.research.helpers.hf_models import their_model
from tests.research.helpers.launches import ROOT

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def tokens_and_merges() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary of 300: two control tokens, the bytes, merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>", "<|begin|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([next(documents.documents("builtin:state_of_the_union/val", ROOT))[:5000]], trainer)
    vocabulary = backend.get_vocab()
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def write(
    path: Path, case: str = "llama, grouped", packing: Any = None, fields: dict[str, Any] | None = None, more: dict | None = None
) -> Path:
    """The model `case` of tests.research.hf_models; matrices packed as `packing`. `fields` replace metadata, `more` adds tensors."""
    theirs = their_model(case)
    model: Any = theirs.config
    tokens, merges = tokens_and_merges()
    told = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}"} | (
        fields or {}
    )
    writer = gguf.GGUFWriter(path, model.model_type)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_rope_freq_base(model.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for key, value in told.items():
        {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not (name == "lm_head.weight" and model.tie_word_embeddings)}
    shape = type("Shape", (), {"num_heads": model.num_attention_heads, "num_kv_heads": model.num_key_value_heads})
    for name, tensor in {**converted(weights, shape, model.model_type), **(more or {})}.items():
        array = tensor.numpy()
        if packing is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, packing), raw_dtype=packing)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpacked(tensor: torch.Tensor, packing: Any) -> torch.Tensor:
    """What a matrix is after it was packed, by the package's own two functions."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), packing), packing))
