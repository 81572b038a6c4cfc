"""Our GPT against transformers' models with the same random weights: logits and gradients, on 1, 2 and 4 real tensor ranks.

On 2 and 4 ranks with and without sequence parallelism.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from models.conversion import mapping, read_config
from parallel.errors import Mistake
from tests.harness import run_ranks
from tests.models.helpers import on_rank
from tests.models.helpers.build import as_arrays, joined, relative, shape, values, whole_model, worst
from tests.models.helpers.conversion import to_hf
from tests.models.helpers.on_rank import BATCH, LENGTH, VOCAB, tokens

TOLERANCE = 1e-5
COMMON = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
NEOX = dict(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, max_position_embeddings=LENGTH, **COMMON
)  # fmt: skip
LLAMA = dict(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96,
    max_position_embeddings=LENGTH, **COMMON,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=LENGTH, **COMMON),
    "gpt2, untied, n_inner": GPT2Config(
        n_layer=1, n_embd=32, n_head=4, n_inner=40, n_positions=LENGTH, tie_word_embeddings=False, **COMMON
    ),
    "pythia": GPTNeoXConfig(**NEOX),
    "pythia, sequential residual": GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    ),
    "pythia, linear scaling": GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 4.0}
    ),
    "llama": LlamaConfig(**LLAMA),
    "llama 3.2, tied": LlamaConfig(
        **LLAMA | dict(num_key_value_heads=1), tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "llama, tied, biases": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu"),
    "pythia, no biases of attention": GPTNeoXConfig(**NEOX, attention_bias=False),
    "llama, biases of attention, wide heads": LlamaConfig(**LLAMA | dict(head_dim=12), attention_bias=True),
    "llama, biases of the mlp": LlamaConfig(**LLAMA | dict(num_key_value_heads=1), mlp_bias=True),
    "mistral, odd width": MistralConfig(**LLAMA | dict(hidden_size=36, head_dim=6), sliding_window=None),
    "qwen2, a window that hides nothing": Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=LENGTH, max_window_layers=1),
    "qwen3, one kv head, odd width": Qwen3Config(
        **LLAMA | dict(num_key_value_heads=1, hidden_size=36, head_dim=16), tie_word_embeddings=True
    ),
    "qwen3, biases of attention": Qwen3Config(**LLAMA | dict(head_dim=8), attention_bias=True),
}  # fmt: skip
LLAMA_LIKE = dict(position="rotary", norm="rmsnorm", mlp="swiglu")
LAYOUTS = [(1, False), (2, False), (4, False), (2, True), (4, True)]
"""(tensor ranks, sequence parallelism)"""
FAST = ((1, False), (4, True))
ON_EACH_LAYOUT = pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=() if layout in FAST else pytest.mark.slow) for layout in LAYOUTS], ids=str
)
IN_DOUBLE = ("gpt2", "gpt2, untied, n_inner", "pythia", "pythia, sequential residual")
"""The others are left out: transformers computes Llama's norms, and eager softmaxes, in fp32 for weights of any precision."""


@dataclass(frozen=True)
class Truth:
    """Random weights of a family, and the logits and gradients that transformers computes with them."""

    theirs: dict[str, Tensor]
    logits: Tensor
    gradients: dict[str, Tensor]


def their_model(case: str, dtype: torch.dtype):
    """Random weights, with norms around one and biases far from zero: a freshly initialised model would hide a lost bias."""
    model = AutoModelForCausalLM.from_config(CONFIGS[case], attn_implementation="eager" if dtype == torch.float32 else "sdpa")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=g) / (parameter.dim() or 1))
    return model.to(dtype).eval()


@functools.cache
def truth(case: str, dtype: torch.dtype) -> Truth:
    model, (ids, targets, weights) = their_model(case, dtype), tokens()
    logits = model(ids).logits
    (weights * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)).sum().backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = mapping.from_hf(read_config.settings(CONFIGS[case]), CONFIGS[case].model_type, theirs)
    return Truth(model.state_dict(), logits.detach(), found)


def our_weights(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return mapping.from_hf(read_config.settings(CONFIGS[case]), CONFIGS[case].model_type, truth(case, dtype).theirs)


@functools.cache
def ours(tensor: int, sequence: bool) -> dict[tuple[str, torch.dtype], tuple[Tensor, dict[str, Tensor]]]:
    """Every case on this layout, in one launch: (whole logits, whole gradients)."""
    keys = [(case, torch.float32) for case in CONFIGS] + [(case, torch.float64) for case in IN_DOUBLE]
    jobs = [(read_config.settings(CONFIGS[case]), as_arrays(our_weights(case, dtype))) for case, dtype in keys]
    ranks = run_ranks(on_rank.whole_models, tensor, jobs, sequence)
    found = {}
    for i, (key, (model, _)) in enumerate(zip(keys, jobs, strict=True)):
        logits = torch.cat([torch.from_numpy(rank[i][0]) for rank in ranks], dim=-1)
        found[key] = (logits[..., : model.vocab_size], joined(model, [rank[i][1] for rank in ranks]))
    return found


@ON_EACH_LAYOUT
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_transformers(case, layout):
    """Largest difference of a logit ≤ 1e-5 of the largest logit, fp32."""
    found, true = ours(*layout)[case, torch.float32][0], truth(case, torch.float32).logits
    assert found.shape == true.shape == (BATCH, LENGTH, VOCAB)
    assert true.abs().max() > 0.5  # else there is nothing to compare
    assert (found - true).abs().max() <= TOLERANCE * true.abs().max()


@ON_EACH_LAYOUT
@pytest.mark.parametrize("case", CONFIGS)
def test_gradients_are_those_of_transformers(case, layout):
    """Of a weighted token loss, each parameter: ‖a − b‖₂ ≤ 1e-5 ‖b‖₂, fp32."""
    error, name = worst(ours(*layout)[case, torch.float32][1], truth(case, torch.float32).gradients)
    assert error <= TOLERANCE, name


@ON_EACH_LAYOUT
@pytest.mark.parametrize("case", IN_DOUBLE)
def test_in_double_precision_nothing_but_rounding_is_left(case, layout):
    """An epsilon or a constant that is slightly off would hide below fp32's rounding."""
    logits, found = ours(*layout)[case, torch.float64]
    assert relative(logits, truth(case, torch.float64).logits) <= 1e-12
    error, name = worst(found, truth(case, torch.float64).gradients)
    assert error <= 1e-10, name


@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(case):
    model, family = read_config.settings(CONFIGS[case]), CONFIGS[case].model_type
    theirs = dict(truth(case, torch.float32).theirs)
    back = to_hf(model, family, mapping.from_hf(model, family, theirs))
    if model.tied:
        del theirs["lm_head.weight"]
    elif family == "gpt_neox":
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")  # what transformers 5 writes into files
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in theirs.items())


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_what_we_write(case, tmp_path):
    """from_pretrained of our tensors in a safetensors file gives the same logits, bit for bit."""
    from safetensors.torch import save_file

    model, family = read_config.settings(CONFIGS[case]), CONFIGS[case].model_type
    save_file(to_hf(model, family, our_weights(case, torch.float32)), tmp_path / "model.safetensors", {"format": "pt"})
    CONFIGS[case].save_pretrained(tmp_path)
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(read.eval()(tokens()[0]).logits, truth(case, torch.float32).logits)


@pytest.mark.parametrize("case", CONFIGS)
def test_names_and_shapes_are_those_of_the_built_model(case):
    model = read_config.settings(CONFIGS[case])
    built = {name: tuple(tensor.shape) for name, tensor in values(whole_model(model)).items()}
    assert mapping.shapes(model) == built
    assert list(mapping.shapes(model)) == list(built)


def test_files_without_the_prefix_and_with_old_buffers_are_read():
    """GPT-2's own file names no `transformer.` and holds masks; Pythia's calls the head `embed_out` and holds rotary tables."""
    theirs, model = truth("gpt2", torch.float32).theirs, read_config.settings(CONFIGS["gpt2"])
    bare = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items() if name != "lm_head.weight"}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, LENGTH, LENGTH), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert worst(mapping.from_hf(model, "gpt2", bare), our_weights("gpt2", torch.float32))[0] == 0

    theirs, model = dict(truth("pythia", torch.float32).theirs), read_config.settings(CONFIGS["pythia"])
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    theirs |= {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2), "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 4, 4)}
    assert worst(mapping.from_hf(model, "gpt_neox", theirs), our_weights("pythia", torch.float32))[0] == 0


def test_a_tied_table_may_be_in_the_files_under_the_head_s_name_alone():
    """transformers reads the same model from such files."""
    for case, family in (("gpt2", "gpt2"), ("llama 3.2, tied", "llama")):
        theirs, model = dict(truth(case, torch.float32).theirs), read_config.settings(CONFIGS[case])
        table = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
        del theirs[table]
        assert "lm_head.weight" in theirs
        assert worst(mapping.from_hf(model, family, theirs), our_weights(case, torch.float32))[0] == 0
        with pytest.raises(Mistake, match="hold no (wte|embed_tokens).weight"):
            mapping.from_hf(model.model_copy(update={"tied": False}), family, theirs)


def test_low_precision_weights_keep_their_type():
    theirs = {name: tensor.bfloat16() for name, tensor in truth("llama", torch.float32).theirs.items()}
    assert {tensor.dtype for tensor in mapping.from_hf(read_config.settings(CONFIGS["llama"]), "llama", theirs).values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("transformer.ln_f.bias"), "no ln_f.bias, which final_norm.bias is made of"),
        (lambda d: d.update({"transformer.h.2.ln_1.weight": torch.ones(64)}), "1 tensors that this model lacks, the first is h.2.ln_1."),
        (lambda d: d.update({"transformer.wpe.weight": torch.ones(8, 64)}), r"wpe.weight makes position.weight \[8, 64\], .* \[16, 64\]"),
        (lambda d: d.update({"lm_head.weight": torch.ones(83, 64)}), "model.tied = True, but the head's weights are not"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, words):
    theirs = dict(truth("gpt2", torch.float32).theirs)
    change(theirs)
    with pytest.raises(Mistake, match=words):
        mapping.from_hf(read_config.settings(CONFIGS["gpt2"]), "gpt2", theirs)


def test_fused_parts_of_the_wrong_heights_are_refused():
    """As many rows in all, but q shorter and k longer."""
    theirs = dict(truth("llama", torch.float32).theirs)
    q, k = (theirs[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    theirs |= {"model.layers.0.self_attn.q_proj.weight": q[8:], "model.layers.0.self_attn.k_proj.weight": torch.cat([q[:8], k])}
    with pytest.raises(Mistake, match=r"\[56, 40, 32\] rows where this model has \[64, 32, 32\]"):
        mapping.from_hf(read_config.settings(CONFIGS["llama"]), "llama", theirs)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", dict(position="rotary"), "model.position = 'rotary' is no gpt2 → that has 'learned'"),
        ("gpt2", dict(num_kv_heads=2), "model.num_kv_heads = 2 is no gpt2"),
        ("gpt2", dict(qk_norm=True), "model.qk_norm = True is no gpt2 → that has False"),
        ("gpt2", dict(norm="variant:Mine"), "model.norm = 'variant:Mine' is no gpt2"),
        ("gpt_neox", dict(position="rotary", residual="post_norm"), "model.residual = 'post_norm' is no gpt_neox → that has 'parallel' or"),
        ("llama", dict(position="rotary", rotary_fraction=0.5, norm="rmsnorm", mlp="swiglu"), "model.rotary_fraction = 0.5 is no llama"),
        ("llama", LLAMA_LIKE | dict(bias=False), "model.qkv_bias = True with model.output_bias = False is no llama → that has both or"),
        ("llama", LLAMA_LIKE | dict(hidden_size=30, head_size=8), "model.num_heads = 4 with model.hidden_size = 30 is no llama"),
        ("gpt2", dict(head_size=16), "model.head_size = 16 is no gpt2 → that has hidden_size / num_heads = 32 / 4"),
        ("gpt2", dict(output_bias=False), "model.output_bias = False is no gpt2 → that has True"),
        ("qwen3", LLAMA_LIKE | dict(bias=False, qkv_bias=False), "model.qk_norm = False is no qwen3 → that has True"),
    ],
)  # fmt: skip
def test_a_model_that_the_family_cannot_hold_is_refused(family, changes, words):
    with pytest.raises(Mistake, match=words):
        to_hf(shape(**changes), family, {})


def test_a_family_that_is_not_known_is_refused():
    with pytest.raises(Mistake, match="model_type = 'bloom' is not a family"):
        mapping.from_hf(shape(), "bloom", {})
