"""Cutting and joining parameters for many shapes, parts and degrees. Pure arithmetic."""

import itertools

import pytest
import torch

from parallel.slices import Slice, gathered, logical_name, make_parameter, slice_of

PARTS = [(8,), (1,), (5,), (83,), (4, 4, 4), (8, 2, 2), (7, 3), (1, 1, 9)]
DEGREES = [1, 2, 3, 4, 8]
CUTS = [
    Slice((*before, sum(parts), *after), len(before), parts)
    for parts, (before, after) in itertools.product(PARTS, [((), ()), ((), (3,)), ((2,), ()), ((2,), (3,))])
]


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """1, 2, 3 …: every element tells its place, and none is the zero of padding."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_join_undoes_cut(cut: Slice, degree: int) -> None:
    full = numbered(cut.shape)
    pieces = [cut.cut(full, rank, degree) for rank in range(degree)]
    assert all(piece.shape == cut.local_shape(degree) for piece in pieces)
    assert torch.equal(cut.join(pieces), full)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_each_element_lies_on_one_rank_in_the_order_of_its_part(cut: Slice, degree: int) -> None:
    """Against torch alone: each part padded with zeros to a multiple of the degree, chunked, and the parts' chunks laid together."""
    padded = [
        torch.cat([part, part.new_zeros(part.shape[: cut.dim] + (-part.shape[cut.dim] % degree,) + part.shape[cut.dim + 1 :])], cut.dim)
        for part in numbered(cut.shape).split(cut.parts, cut.dim)
    ]
    for rank in range(degree):
        expected = torch.cat([part.chunk(degree, cut.dim)[rank] for part in padded], cut.dim)
        assert torch.equal(cut.cut(numbered(cut.shape), rank, degree), expected)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_stands_in_padding_reaches_nobody(cut: Slice, degree: int) -> None:
    full = numbered(cut.shape)
    pieces = []
    for rank in range(degree):
        piece = torch.full(cut.local_shape(degree), torch.nan, dtype=torch.float64)
        for region in cut.regions(rank, degree):
            piece.narrow(cut.dim, region.local, region.length).copy_(full.narrow(cut.dim, region.whole, region.length))
        pieces.append(piece)
    assert torch.equal(cut.join(pieces), full)


def test_a_fused_weight_gives_each_rank_its_own_q_k_and_v() -> None:
    cut = Slice((8,), 0, (4, 2, 2))
    assert cut.cut(torch.arange(8), 0, 2).tolist() == [0, 1, 4, 6]
    assert cut.cut(torch.arange(8), 1, 2).tolist() == [2, 3, 5, 7]


def test_an_uncut_parameter_is_whole_on_every_rank() -> None:
    full, cut = numbered((3, 2)), Slice((3, 2))
    piece = cut.cut(full, 1, 2)
    assert torch.equal(piece, full) and piece.data_ptr() != full.data_ptr(), "a copy, or a rank would train the drawn tensor"
    assert torch.equal(cut.join([piece, piece]), full) and cut.local_shape(2) == (3, 2)


def test_what_does_not_fit_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) do not add up to 8"):
        Slice((8, 2), 0, (4, 3))
    with pytest.raises(ValueError, match="dim 2 is not one of"):
        Slice((8, 2), 2, (8,))
    with pytest.raises(ValueError, match="dim -1 is not one of"):
        Slice((8, 2), -1, (2,))
    cut = Slice((8, 2), 0, (8,))
    with pytest.raises(ValueError, match=r"\(8, 2\) cannot be cut from a tensor of shape \(8, 3\)"):
        cut.cut(torch.zeros(8, 3), 0, 2)
    with pytest.raises(ValueError, match=r"\(4, 2\), not \(8, 2\)"):
        cut.join([torch.zeros(8, 2), torch.zeros(8, 2)])


def test_a_parameter_knows_its_name_and_its_cut() -> None:
    cut = Slice((4, 2), 0, (4,))
    sliced, alone = make_parameter("a.weight", numbered((4, 2)), cut, 1, 2), make_parameter("a.weight", numbered((4, 2)), cut, 0, 1)
    assert logical_name(sliced) == "a.weight" and slice_of(sliced) is cut and sliced.tolist() == [[5, 6], [7, 8]]
    assert sliced.tensor_model_parallel, "DeepSpeed's gradient norm reads this"
    replicated = make_parameter("b", numbered((4, 2)), Slice((4, 2)), 1, 2)
    assert not hasattr(alone, "tensor_model_parallel") and not hasattr(replicated, "tensor_model_parallel"), "counted on tensor rank 0"
    assert torch.equal(gathered(alone.data, cut, None), numbered((4, 2)))


def test_a_slice_prints_its_cut() -> None:
    assert str(Slice((8, 2), 0, (8,))) == "[8, 2] cut along dim 0"
    assert str(Slice((8, 2), 0, (4, 2, 2))) == "[8, 2] cut along dim 0 in parts [4, 2, 2]"
    assert str(Slice((8,))) == "[8] on every rank"
