"""Documents packed into one row, against transformers with the same weights and its flattened inputs."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

from models import gpt
from models.conversion import mapping, read_config
from models.segments import SEGMENTS
from parallel.layers import PlainModule
from tests.models.conversion.test_mapping import CONFIGS, TOLERANCE, their_model
from tests.models.helpers.build import ALONE, SEED, fill, gradients, worst
from tests.models.helpers.on_rank import LENGTH, VOCAB

LENGTHS = (5, 1, LENGTH - 6)


@pytest.mark.parametrize("case", ["llama", "llama 3.2, tied", "qwen3, one kv head, odd width"])
def test_packed_documents_are_those_of_flattened_inputs(case: str) -> None:
    """Logits and the gradient of every parameter, fp32, within 1e-5; and not those of a row that is one document."""
    g = torch.Generator().manual_seed(4)
    documents = [torch.randint(0, VOCAB, (length,), generator=g) for length in LENGTHS]
    targets, weights = torch.randint(0, VOCAB, (1, LENGTH), generator=g), torch.rand(1, LENGTH, generator=g)
    flat = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": document.tolist()} for document in documents])
    assert flat["position_ids"].tolist() == [[place for length in LENGTHS for place in range(length)]]

    theirs = their_model(case, torch.float32)
    logits = theirs(input_ids=flat["input_ids"], position_ids=flat["position_ids"], use_cache=False).logits
    one_document = theirs(input_ids=flat["input_ids"], use_cache=False).logits.detach()
    (weights * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(1, -1)).sum().backward()

    model, family = read_config.settings(CONFIGS[case]), CONFIGS[case].model_type
    ours = PlainModule(gpt.layers(model, ALONE, SEED, context=(SEGMENTS,)))
    fill(ours, mapping.from_hf(model, family, theirs.state_dict()))
    segments = torch.repeat_interleave(torch.tensor([4, 2, 9]), torch.tensor(LENGTHS))[None]
    found = ours((flat["input_ids"], segments))[..., :VOCAB]
    (weights * F.cross_entropy(found.flatten(0, 1), targets.flatten(), reduction="none").view(1, -1)).sum().backward()

    assert (found - logits).abs().max() <= TOLERANCE * logits.abs().max()
    assert (found - one_document).abs().max() > 0.1 * logits.abs().max()
    true = mapping.from_hf(model, family, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    error, name = worst(gradients(ours), true)
    assert error <= TOLERANCE, name
