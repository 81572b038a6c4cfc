"""Each residual scheme against its equations with explicit attention, MLP and norms, in fp64, on one rank and on two."""

import pytest
import torch

from models.block import RESIDUALS
from models.norm import NORMS
from tests.harness import run_ranks
from tests.models.helpers import on_rank, reference
from tests.models.helpers.build import joined_part, random_part, shape, whole_model, worst


def equations(residual: str, model, x, w):
    """y of one block."""

    def attention(x):
        return reference.attention(x, w, "block.attention", model)

    def mlp(x):
        return reference.mlp(x, w, "block.mlp")

    def norm(x, which):
        return reference.norm(x, w, f"block.{which}_norm", model)

    if residual == "pre_norm":
        h = x + attention(norm(x, "attention"))
        return h + mlp(norm(h, "mlp"))
    if residual == "post_norm":
        h = norm(x + attention(x), "attention")
        return norm(h + mlp(h), "mlp")
    return x + attention(norm(x, "attention")) + mlp(norm(x, "mlp"))


MODELS = {f"{residual}, {norm}": shape(residual=residual, norm=norm, position="none") for residual in RESIDUALS for norm in NORMS}


@pytest.mark.parametrize("tensor", [1, 2])
def test_value_and_gradients_are_the_equations(tensor):
    """To 1e-12, for every parameter by its logical name."""
    problems = {case: random_part("block", model) for case, model in MODELS.items()}
    ranks = run_ranks(on_rank.run_parts, tensor, [("block", MODELS[case], *problem) for case, problem in problems.items()])
    for i, (case, (weights, x, dy)) in enumerate(problems.items()):
        model = MODELS[case]
        true = reference.with_gradients(lambda x, w, model=model: equations(model.residual, model, x, w), x, weights, dy)
        error, name = worst(joined_part("block", model, [rank[i] for rank in ranks]), true)
        assert error <= 1e-12, (case, name)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_reaches_the_head_is_normalised_once(residual):
    """Pre-norm and parallel models end with a norm of their own. The output of a post-norm block is already normalised."""
    model = whole_model(shape(residual=residual)).double()
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.arange(10)[None])
    assert hasattr(model, "final_norm") == (residual != "post_norm")
    assert torch.allclose(seen[0].var(-1, unbiased=False), torch.ones(1, 10, dtype=torch.float64), rtol=0.05)
    assert seen[0].mean(-1).abs().max() < 1e-12
