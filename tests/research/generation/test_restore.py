"""A restored model has the checkpoint's weights, in the precision of training or the requested one."""

import pytest
import torch

from models.inference.driver import DriverDecoder
from models.init import UninitializedWeights
from parallel.errors import Mistake
from parallel.grid import Grid
from research.config import serialization
from research.generation.restore import DecoderSpec, dtype_of, restored
from tests.models.helpers.build import random_weights, values, worst
from tests.research.helpers import untrained

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NORM = "from models.norm import RMSNorm\nclass Own(RMSNorm):\n    def forward(self, x):\n        return 2 * super().forward(x)\n"
INIT = "from models.init import GPT2Init\nclass Own(GPT2Init):\n    def inner_std(self):\n        return 7.0\n"


def spec(folder, step: int = 3, **settings) -> DecoderSpec:
    return DecoderSpec(folder.path, folder.checkpoints / f"step_{step:06d}", **settings)


def test_weights_are_those_of_the_checkpoint(tmp_path):
    folder = untrained.make(tmp_path, steps=(3, 6), tied=False)
    for step in (3, 6):
        true = random_weights(serialization.load(folder.config).model, step)
        assert worst(values(restored(spec(folder, step), Grid(), CPU)), {n: t.float() for n, t in true.items()})[0] == 0


@pytest.mark.parametrize(("variant", "settings"), [(NORM, {"norm": "variant:Own"}), (INIT, {"init": "variant:Own"})])
def test_classes_of_the_run_s_own_copy_are_used(variant, settings, tmp_path):
    folder = untrained.make(tmp_path, variant=variant, **settings)
    decoder = spec(folder, slots=2, context=8).on(Grid(), CPU)
    assert not isinstance(decoder, DriverDecoder) and decoder.slots == 2 and decoder.length == 8
    named = {type(part).__name__ for part in decoder.module.modules()}
    assert ("Own" in named) == ("norm" in settings)
    decoder.admit([[1, 2], [3]])


def test_precisions(tmp_path):
    """As trained or as requested. fp16 of training becomes fp32 on a CPU; requested fp16 is refused there."""
    assert dtype_of(None, "bf16", CPU) == torch.bfloat16 == dtype_of("bf16", "fp32", CPU)
    assert dtype_of(None, "fp16", CPU) == torch.float32 == dtype_of("fp32", "bf16", CPU)
    assert dtype_of(None, "fp16", GPU) == torch.float16 == dtype_of("fp16", "fp32", GPU)
    with pytest.raises(Mistake, match="'fp16' needs a GPU, .* → use 'fp32' or 'bf16'"):
        dtype_of("fp16", "fp32", CPU)
    folder = untrained.make(tmp_path, precision="bf16")
    assert {tensor.dtype for tensor in values(restored(spec(folder), Grid(), CPU)).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in values(restored(spec(folder, precision="fp32"), Grid(), CPU)).values()} == {torch.float32}


def test_nothing_is_drawn_for_weights_that_are_read():
    """A table of zeros without memory of its own."""
    init = UninitializedWeights.__new__(UninitializedWeights)
    for draw in (init.embedding, init.inner, init.residual):
        table = draw("x", (1000, 1000))
        assert table.shape == (1000, 1000) and table.untyped_storage().nbytes() == 4 and not table.any()
