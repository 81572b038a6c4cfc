"""Our conjugate pairs have, under the checker, the types that the papers give them; any other use of them is an error."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from parallel import collectives
from parallel.cross_entropy import vocab_parallel_cross_entropy
from research.verification.spmd_check import fake_world
from research.verification.spmd_collectives import TypeMismatch, typed_collectives
from research.verification.spmd_functions import TypeFinder

spmd = pytest.importorskip("spmd_types")

from spmd_types import I, P, R, V
from spmd_types.checker import typecheck

MESH = {"outer": spmd.MeshAxis.of(2, 2), "inner": spmd.MeshAxis.of(2, 1)}


@contextmanager
def checked():
    """Rank 3 of four ranks, checked; yields the group of all and the group of the inner axis, (2, 3)."""
    with fake_world(3, 4):
        groups = dist.new_group([0, 1, 2, 3]), dist.new_group([2, 3], use_local_synchronization=True)
        with spmd.set_current_mesh(MESH), typecheck(), typed_collectives(), TypeFinder():
            yield groups


def typed(outer, inner, *shape):
    with spmd.no_typecheck():
        x = torch.ones(shape or (2, 4, 8), requires_grad=True)
    return spmd.assert_type(x, {MESH["outer"]: outer, MESH["inner"]: inner})


def types(x):
    return spmd.get_axis_local_type(x, MESH["outer"]), spmd.get_axis_local_type(x, MESH["inner"])


PAIRS = {  # name: (what goes in, what comes out): arXiv:1909.08053, arXiv:2205.05198
    "copy_to_tensor_ranks": (I, R),
    "reduce_from_tensor_ranks": (V, I),
    "gather_from_tensor_ranks": (V, I),
    "scatter_to_tensor_ranks": (I, V),
    "gather_shared": (V, R),
    "gather_sequence": (V, R),
    "reduce_scatter_sequence": (V, V),
    "scatter_sequence": (I, V),
    "join_sequence": (V, I),
}


def test_every_pair_is_here():
    made_by = collectives.copy_to_tensor_ranks.__qualname__
    assert PAIRS.keys() == {name for name, value in vars(collectives).items() if getattr(value, "__qualname__", "") == made_by}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_its_types(name):
    takes, gives = PAIRS[name]
    with checked() as (whole, inner):
        pair = getattr(collectives, name)
        assert types(pair(typed(takes, takes), whole)) == (gives, gives)
        for other in (I, R, V):  # along an axis that the group does not span nothing happens
            assert types(pair(typed(other, takes), inner)) == (other, gives)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_given_anything_else_is_an_error(name):
    takes = {PAIRS[name][0]} | ({P} if PAIRS[name][0] is V and "reduce" in name else set())
    with checked() as (whole, _):
        for wrong in {I, R, V, P} - takes:
            with pytest.raises(TypeMismatch):
                getattr(collectives, name)(typed(wrong, wrong), whole)


def test_the_gradient_of_a_pair_is_its_own():
    """What autograd runs in the backward pass is the pair's backward: here, on fake ranks, a gather of four equal pieces."""
    with checked() as (whole, _):
        x = typed(I, I)
        y = collectives.scatter_sequence(x, whole)
        with spmd.no_typecheck():
            y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad, torch.full((2, 4, 8), 3.0))


def test_cross_entropy_takes_pieces_and_gives_a_total():
    with checked() as (whole, _):
        targets = spmd.assert_type(torch.zeros(2, 4, dtype=torch.int64), R)
        for smoothing in (0.0, 0.1):
            loss = vocab_parallel_cross_entropy(typed(V, V), targets, whole, 30, smoothing)
            assert types(loss) == (I, I)
        with pytest.raises(TypeMismatch):
            vocab_parallel_cross_entropy(typed(R, R), targets, whole, 30)


class Doubled(torch.autograd.Function):
    """A variant's own function, written the newer way."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x[0], x[1]


def test_a_function_of_ones_own_needs_no_rule():
    with checked():
        for kind in (I, R, V):
            assert types(Doubled.apply(typed(kind, V))) == (kind, V)


def test_what_cannot_be_typed_says_so():
    with checked(), pytest.raises(TypeMismatch, match="more than one tensor"):
        Halves.apply(typed(I, I))


def test_writing_ones_own_into_a_constant_makes_it_ones_own():
    with checked():
        buffer = torch.zeros(2, 3)
        assert types(buffer) == (R, R)
        with spmd.no_typecheck():
            piece = torch.ones(3)
        buffer[0] = spmd.assert_type(piece, {MESH["outer"]: R, MESH["inner"]: V})
        assert types(buffer) == (R, V)
