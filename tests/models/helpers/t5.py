"""Small T5s for tests: settings with one thing changed, a batch with padding, and transformers' UMT5 with the same weights."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import gpt, t5
from models.encoder_config import T5
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters
from parallel.slices import slice_of
from tests.models.helpers.build import ALONE, SEED, as_arrays, fill, gradients, tensor_grid, values

SHAPE = dict(
    hidden_size=32, num_heads=4, ffn_size=48, vocab_size=83, norm_eps=1e-6, mlp="relu", init="t5", embedding_dropout=0.0,
    residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0, num_encoder_layers=2, num_layers=3, source_length=12, seq_length=8,
    relative_buckets=8, relative_distance=10, tied=True,
)  # fmt: skip
"""A vocabulary that no tensor degree divides, stacks of different depth, and buckets of which a row uses all."""
DROPPING = dict.fromkeys(("embedding_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"), 0.1)
PADDING = -1
Spoil = Callable[[PlainModule], None]


def shape(**changes) -> T5:
    """SHAPE with settings replaced."""
    return T5(**(SHAPE | changes))


def whole_model(model: T5, grid: Grid = ALONE, recompute: str = "none") -> PlainModule:
    """All layers in this process (on this tensor rank)."""
    return PlainModule(t5.layers(model, grid, SEED, recompute=recompute, context=("segments",)))


@functools.cache
def _random_weights(settings: str, seed: int) -> dict[str, Tensor]:
    module, g = whole_model(T5.model_validate_json(settings)).double(), torch.Generator().manual_seed(seed)
    # Less than `scatter` moves them: scores are not divided by √e, and a softmax that is nearly 0 or 1 multiplies rounding errors.
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=g, dtype=torch.float64) for name, tensor in values(module).items()}


def random_weights(model: T5, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a whole model in fp64, away from initial values, at which a lost norm would not be noticed."""
    return _random_weights(model.model_dump_json(), seed)


class Batch(NamedTuple):
    """ids and segments 'b (S+T)', targets and weights 'b T'."""

    ids: Tensor
    segments: Tensor
    targets: Tensor
    weights: Tensor
    samples: Tensor

    def inputs(self, model: T5) -> tuple[Tensor, ...]:
        """What the first layer takes."""
        return (self.ids, *((self.samples,) if model.drops else ()), self.segments)


def batch(model: T5) -> Batch:
    """Three pairs, one in each row: a whole source with a short target, a short source with a whole target, and whole ones."""
    g, (s, t) = torch.Generator().manual_seed(3), (model.source_length, model.seq_length)
    ids = torch.randint(1, model.vocab_size, (3, s + t), generator=g)
    targets = torch.randint(1, model.vocab_size, (3, t), generator=g)
    weights = torch.rand(3, t, generator=g).round(decimals=1) / 10
    segments = torch.zeros(3, s + t, dtype=torch.int64)
    segments[0, s + t // 2 :] = PADDING
    weights[0, t // 2 :] = 0
    segments[1, s // 2 : s] = PADDING
    return Batch(ids, segments, targets, weights, torch.tensor([4, 1_000, 7]))


def run(
    model: T5, weights: Mapping[str, Tensor], grid: Grid, batch: Batch, recompute: str = "none", spoil: Spoil | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, this rank's logits, its gradients by logical name) in the weights' precision."""
    module = whole_model(model, grid, recompute).to(next(iter(weights.values())).dtype)
    fill(module, weights, grid)
    if spoil:
        spoil(module)
    logits = module(batch.inputs(model))
    loss = gpt.TokenLoss(model.vocab_size, 0.0, grid.tensor_group)(logits, (batch.targets, batch.weights.to(logits.dtype)))
    loss.backward()
    return loss.detach(), logits.detach(), gradients(module)


def on_rank(jobs: list[dict]) -> list[tuple]:
    """`run` of each job on all ranks of the world; a job: model, dtype, sequence, and what `run` takes."""
    found = []
    for job in jobs:
        settings = dict(job)
        model, dtype, sequence = settings.pop("model"), settings.pop("dtype"), settings.pop("sequence")
        weights = {name: tensor.to(dtype) for name, tensor in random_weights(model).items()}
        loss, logits, own = run(model, weights, tensor_grid(sequence), batch(model), **settings)
        found.append((float(loss), logits.numpy(), as_arrays(own)))
    return found


def joined(model: T5, ranks: list[tuple]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, whole logits, whole gradients) of what `on_rank` returned for a job on each rank. What is not cut must be equal on all."""
    losses, logits, pieces = zip(*ranks, strict=True)
    assert len(set(losses)) == 1
    found = {}
    for name, parameter in unique_parameters(whole_model(model)):
        own = [torch.from_numpy(rank[name]) for rank in pieces]
        if slice_of(parameter).dim is None:
            assert all(torch.equal(piece, own[0]) for piece in own), f"{name} differs between tensor ranks"
        found[name] = slice_of(parameter).join(own)
    return losses[0], torch.cat([torch.from_numpy(part) for part in logits], -1)[..., : model.vocab_size], found


# transformers.


def their_settings(model: T5) -> dict:
    """Of a transformers UMT5Config. Without dropout."""
    return dict(
        vocab_size=model.vocab_size, d_model=model.hidden_size, d_kv=model.head_size, d_ff=model.ffn_size,
        num_layers=model.num_encoder_layers, num_decoder_layers=model.num_layers, num_heads=model.num_heads,
        relative_attention_num_buckets=model.relative_buckets, relative_attention_max_distance=model.relative_distance,
        dropout_rate=0.0, layer_norm_epsilon=model.norm_eps, feed_forward_proj={"relu": "relu", "geglu_tanh": "gated-gelu"}[model.mlp],
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def their_model(model: T5, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers UMT5ForConditionalGeneration with these weights."""
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    config = UMT5Config(**their_settings(model))
    config.tie_word_embeddings = model.tied  # the constructor ignores it
    theirs = UMT5ForConditionalGeneration(config).to(dtype).eval()
    theirs.set_input_embeddings(theirs.shared)  # otherwise an untied head unties the two stacks as well
    missing, unexpected = theirs.load_state_dict(their_names(model, weights), strict=False)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | ({"lm_head.weight"} if model.tied else set())
    assert not unexpected and set(missing) <= copies
    return theirs


def their_names(model: T5, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole tensors by logical name -> by UMT5's names."""
    found = {"shared.weight": weights["embedding.weight"]}
    if not model.tied:
        found["lm_head.weight"] = weights["head.weight"]
    for stack, number in (("encoder", model.num_encoder_layers), ("decoder", model.num_layers)):
        found[f"{stack}.final_layer_norm.weight"] = weights[f"{stack}.final_norm.weight"]
        for i in range(number):
            ours, theirs = f"{stack}.blocks.{i}", f"{stack}.block.{i}.layer"
            found |= _attention(weights, f"{ours}.attention", f"{theirs}.0.SelfAttention", ("qkv",))
            found[f"{theirs}.0.SelfAttention.relative_attention_bias.weight"] = weights[f"{ours}.attention.position.weight"]
            found[f"{theirs}.0.layer_norm.weight"] = weights[f"{ours}.attention_norm.weight"]
            last = 1
            if stack == "decoder":
                found |= _attention(weights, f"{ours}.cross_attention", f"{theirs}.1.EncDecAttention", ("q", "kv"))
                found[f"{theirs}.1.layer_norm.weight"] = weights[f"{ours}.cross_norm.weight"]
                last = 2
            found[f"{theirs}.{last}.layer_norm.weight"] = weights[f"{ours}.mlp_norm.weight"]
            up = weights[f"{ours}.mlp.up.weight"].split(model.ffn_size)
            names = ("wi",) if len(up) == 1 else ("wi_0", "wi_1")
            found |= {f"{theirs}.{last}.DenseReluDense.{name}.weight": part for name, part in zip(names, up, strict=True)}
            found[f"{theirs}.{last}.DenseReluDense.wo.weight"] = weights[f"{ours}.mlp.down.weight"]
    return found


def _attention(weights: Mapping[str, Tensor], ours: str, theirs: str, fused: tuple[str, ...]) -> dict[str, Tensor]:
    found = {f"{theirs}.o.weight": weights[f"{ours}.output.weight"]}
    for name in fused:
        parts = weights[f"{ours}.{name}.weight"].chunk(len(name))
        found |= {f"{theirs}.{letter}.weight": part for letter, part in zip(name, parts, strict=True)}
    return found


@functools.cache
def _theirs(settings: str) -> tuple[float, Tensor, dict[str, Tensor]]:
    model = T5.model_validate_json(settings)
    weights = {name: tensor.float().double() for name, tensor in random_weights(model).items()}
    theirs, pairs = their_model(model, weights, torch.float64), batch(model)
    (source, target), (of_source, _) = (x.split([model.source_length, model.seq_length], 1) for x in (pairs.ids, pairs.segments))
    logits = theirs(input_ids=source, attention_mask=(of_source != PADDING).long(), decoder_input_ids=target).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), pairs.targets.flatten(), reduction="none")
    loss = (pairs.weights.flatten() * losses).sum()
    loss.backward()
    return float(loss.detach()), logits.detach(), {name: parameter.grad for name, parameter in theirs.named_parameters()}


def theirs(model: T5) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients by UMT5's names) of transformers' UMT5 with `random_weights`, rounded to fp32, on `batch`.

    It computes in fp64, but for the variances of its norms, so that rounding is ours alone.
    """
    return _theirs(model.model_dump_json())
