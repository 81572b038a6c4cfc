"""FIM, spans, masks and pairs as training reads them: a step is the same on every layout, and its sum of weights is known beforehand."""

import numpy as np
import pytest

from research.config.batch_sizes import BatchSizes
from research.config.examples import FillInMiddle, Masked, Pairs, Spans
from research.data import tokenizer
from research.data.blend import Blend, Stage
from research.data.examples import ExampleSampler
from research.data.fill_in_middle import FillInMiddleExamples
from research.data.masked_lm import MaskedExamples
from research.data.pairs import JoinedPairs, PairExamples
from research.data.span_corruption import SpanExamples
from research.data.token_store import TokenStore, write

TEXT = "der Fluß — 猫, and more of it: def f(x):\n    return x\n" * 8
KINDS = {
    "fim": (FillInMiddleExamples, FillInMiddle(rate=0.7, spm_rate=0.5, confine=True)),
    "spans": (SpanExamples, Spans(rate=0.15, mean_length=3.0)),
    "masked": (MaskedExamples, Masked(rate=0.15)),
    "pairs": (PairExamples, Pairs()),
    "joined": (JoinedPairs, Pairs()),
}
OF_T5 = ("spans", "pairs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_on_every_layout(kind, tmp_path):
    own = tokenizer.fixed("builtin:bytes+fim+spans+mask+sep")
    made, chosen = KINDS[kind]
    examples, options = [], chosen.options | ({"source_length": 48} if kind in OF_T5 else {})
    for name in ("one", "two"):
        texts = [(own.encode(TEXT[i * 9 :]), []) for i in range(12)]
        if kind in ("pairs", "joined"):
            sep = own.backend.token_to_id("<sep>")
            texts = [(own.encode(TEXT[: 1 + i % 13]), [sep, *own.encode(TEXT[i % 7 : i])]) for i in range(99)]
        write(tmp_path / name, ((np.array([*one, *other, own.end_of_text]), 1) for one, other in texts), own.vocab_size, {})
        examples.append(made(TokenStore(tmp_path / name), own, 64, 5, **options))
    blend = Blend(["one", "two"], [Stage(0, (0.75, 0.25))], 5)
    read = lambda size, micro: [  # noqa: E731
        batch for rank in range(size) for batch in ExampleSampler(examples, blend, BatchSizes(24), micro, 5).micro_batches(11, rank, size)
    ]
    alone = [np.concatenate(parts) for parts in zip(*[batch[:4] for batch in read(1, 24)], strict=True)]
    for size, micro in ((2, 3), (4, 2), (1, 8)):
        found = read(size, micro)
        for whole, parts in zip(alone, zip(*[batch[:4] for batch in found], strict=True), strict=True):
            scale = 1 if whole.dtype != np.float32 else len(read(1, 24)) / len(found)
            assert np.allclose(np.concatenate(parts) * scale, whole, rtol=1e-6, atol=0)
        total = ExampleSampler(examples, blend, BatchSizes(24), micro, 5).mask_sum(11)
        assert total == sum(int((batch.weights > 0).sum()) for batch in found)
        assert np.mean([batch.weights.sum(dtype=np.float64) for batch in found]) == pytest.approx(1, rel=1e-6)
        assert all((batch.segments is not None) == (kind != "masked") for batch in found)
