"""Every collective of torch.distributed has a rule or is refused, while a check runs and no longer."""

import pytest
import torch
import torch.distributed as dist

spmd = pytest.importorskip("spmd_types")

from spmd_types import I, P, R, V
from spmd_types.checker import typecheck

from research.verification.spmd_check import fake_world
from research.verification.spmd_collectives import WITHOUT_RULE, TypeMismatch, typed_collectives

TENSOR = spmd.MeshAxis.of(4, 1)
RULES = {"all_reduce", "all_gather", "all_gather_single", "reduce_scatter", "reduce_scatter_single"}
WORDS = ("all_", "broadcast", "gather", "reduce", "scatter", "send", "recv")


def of(kind):
    with spmd.no_typecheck():
        return spmd.assert_type(torch.ones(4), {TENSOR: kind})


def test_no_collective_of_tensors_is_waved_through():
    public = {name for name in dir(dist) if name.removeprefix("batch_").removeprefix("i").startswith(WORDS)}
    of_tensors = {name for name in public if callable(getattr(dist, name)) and "object" not in name}
    assert of_tensors == RULES | set(WITHOUT_RULE)


def test_sums_maxima_and_gathers():
    with fake_world(0, 4), spmd.set_current_mesh({"tensor": TENSOR}), typed_collectives():
        with torch.no_grad(), typecheck():
            for kind in (P, V):
                dist.all_reduce(x := of(kind))
                assert spmd.get_axis_local_type(x, TENSOR) is I
            dist.all_reduce(x := of(R), op=dist.ReduceOp.MAX)
            dist.all_gather(pieces := [of(R) for _ in range(4)], of(V))
            assert {spmd.get_axis_local_type(piece, TENSOR) for piece in pieces} == {I}
            for wrong in (I, R):
                with pytest.raises(TypeMismatch, match="takes P or V"):
                    dist.all_reduce(of(wrong))
            with pytest.raises(TypeMismatch, match="takes V"):
                dist.all_gather(pieces, of(P))
            dist.all_gather_single(whole := torch.cat([of(R)] * 4), of(V))
            dist.reduce_scatter_single(mine := of(V), torch.cat([of(P)] * 4))
            assert [spmd.get_axis_local_type(x, TENSOR) for x in (whole, mine)] == [I, V]
            with pytest.raises(TypeMismatch, match="takes V"):
                dist.all_gather_single(whole, of(P))
            with pytest.raises(TypeMismatch, match="takes P or V"):
                dist.reduce_scatter_single(mine, torch.cat([of(I)] * 4))
            with pytest.raises(TypeMismatch, match="has no rule"):
                dist.broadcast(of(I), 0)
        dist.broadcast(torch.ones(1), 0)  # the checker is off
    assert {getattr(dist, name).__module__ for name in RULES} == {dist.distributed_c10d.__name__}
