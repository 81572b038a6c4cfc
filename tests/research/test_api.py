"""research/api.py against transformers, on the same weights: logits, hidden states, attention, generated ids; and what it refuses."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from research import ROOT, api
from research.cli import generate
from research.tracking import metrics
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence
from tests.research.helpers.hf_models import LENGTH, VOCAB, imported, their_folder

CASES = ["gpt2", "pythia", "llama, grouped"]
IDS = torch.randint(0, VOCAB, (2, LENGTH - 9), generator=torch.Generator().manual_seed(3))
WINDOW = """
import torch
from torch.nn import functional as F

from models.attention import Attention, Core


class WindowCore(Core):
    def forward(self, q, k, v, bias, samples):
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & (i[:, None] - i < 4))


class Window(Attention):
    core_class = WindowCore
"""
OWN_ATTENTION = """
from models.attention import Attention


class Own(Attention):
    def forward(self, x, samples=None):
        return self.output(self.qkv(x)[..., : x.shape[-1]])
"""
NO_ATTENTION = """
from models.block import PreNormBlock


class Own(PreNormBlock):
    def __init__(self, name, context):
        super().__init__(name, context)
        self.mixer = self.attention
        del self.attention

    def forward(self, x, samples=None):
        return x + self.feed_forward(self.mlp_norm(x), samples)
"""


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[api.Model, transformers.PreTrainedModel]:
    """Our model as imported, and theirs."""
    place = tmp_path_factory.mktemp("api")
    folder = their_folder(place / "theirs", request.param)
    run = imported(folder, place, "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return api.load(run.path), theirs.eval()


@torch.no_grad()
def test_logits_hidden_states_and_attention_are_those_of_transformers(both) -> None:
    """To 1e-5 of the largest value; of a batch and of one of its sequences."""
    ours, theirs = both
    found = theirs(IDS, output_hidden_states=True, output_attentions=True)
    close(ours.logits(IDS), found.logits)
    close(ours.logits(IDS[1].tolist()), found.logits[1])
    states = ours.hidden_states(IDS)
    assert list(states) == ours.layers[:-1]
    for i, expected in enumerate(found.hidden_states[1:-1]):
        close(states[f"blocks.{i}"], expected)
    close(states["final_norm"], found.hidden_states[-1])
    for i, expected in enumerate(found.attentions):
        close(ours.attention(IDS, i), expected)
        close(ours.attention(IDS[0], f"blocks.{i}"), expected[0])
    scores = found.logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    close(ours.log_probabilities(IDS), scores)
    assert ours.log_probabilities(IDS[0]).shape == (IDS.shape[1] - 1,)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> api.Model:
    return api.load(untrained.make(tmp_path_factory.mktemp("run"), steps=(3, 7)).path)


def test_a_text_is_that_of_the_generate_verb(model: api.Model, capsys: pytest.CaptureFixture) -> None:
    options = ["--max_new_tokens", "9", "--temperature", "0.8", "--top_p", "0.9", "--seed", "5"]
    generate.main([str(model.folder.path), "--prompt", "the people", *options])
    printed = capsys.readouterr().out
    found = model.generate("the people", max_new_tokens=9, temperature=0.8, top_p=0.9, seed=5)
    assert found and printed == f"the people{found}\n"
    assert found == "".join(model.stream("the people", 9, seed=5, temperature=0.8, top_p=0.9))
    assert found != model.generate("the people", max_new_tokens=9, temperature=0.8, top_p=0.9, seed=6)
    assert model.generate("the people", stop=model.generate("the people")[3:5]) == model.generate("the people")[:3]


def test_a_later_text_ends_an_open_stream(model: api.Model) -> None:
    """The later text is whole, the earlier stream says why it goes no further, and a stream that has ended is not disturbed."""
    whole = model.generate("the people", 9)
    open_stream = model.stream("in peace", 9)
    next(open_stream)
    assert "".join(model.stream("the people", 9)) == whole
    assert "this stream was ended by a later text of the same model → read one stream" in sentence(lambda: next(open_stream))
    almost = model.stream("the people", 1)
    assert next(almost) == model.generate("the people", 1) and list(almost) == []


def test_ids_and_text_are_each_other(model: api.Model) -> None:
    ids = model.encode("the people of the union")
    assert model.decode(ids) == model.decode(torch.tensor(ids)) == "the people of the union"
    assert repr(model).startswith(f"<{model.folder.title}, step 7, ")
    assert api.load(model.folder.path, step=3).step == 3 and api.load(model.checkpoint).step == 7


def test_weights_are_the_module_s(model: api.Model) -> None:
    weights = model.weights()
    assert {"embedding.weight", "blocks.1.attention.qkv.weight"} <= set(weights)
    before = model.logits([1, 2, 3])
    weights["final_norm.bias"] += 1.0
    assert not torch.equal(model.logits([1, 2, 3]), before)
    weights["final_norm.bias"] -= 1.0


def test_attention_of_a_variant_is_its_own(tmp_path: Path) -> None:
    """Each token attends to itself and the three before it."""
    model = api.load(untrained.make(tmp_path, variant=WINDOW, attention="variant:Window").path)
    probabilities = model.attention([5, 3, 8, 13, 21, 1, 2], 1)
    i = torch.arange(7)
    outside = (i > i[:, None]) | (i[:, None] - i >= 4)
    assert float(probabilities.masked_fill(~outside, 0).abs().max()) == 0 and float(probabilities.masked_fill(outside, 1).min()) > 0
    assert torch.allclose(probabilities.sum(-1), torch.ones(4, 7))


@pytest.mark.parametrize(
    ("setting", "own", "said"),
    [
        ("attention", OWN_ATTENTION, "blocks.1.attention does not call its core → let its forward call self.core"),
        ("residual", NO_ATTENTION, "blocks.1 has no attention.core, whose probabilities could be read → use a block with"),
    ],
)
def test_attention_without_a_core_is_refused(tmp_path: Path, setting: str, own: str, said: str) -> None:
    model = api.load(untrained.make(tmp_path, variant=own, **{setting: "variant:Own"}).path)
    assert said in sentence(lambda: model.attention([5, 3, 8], 1))


def test_a_window_is_generated_without_a_cache_and_a_warning_says_so_once(tmp_path: Path) -> None:
    """Greedy tokens are those of the model's own logits, which know of no cache."""
    model = api.load(untrained.make(tmp_path, variant=WINDOW, attention="variant:Window", tied=False).path)
    with pytest.warns(UserWarning, match="no KV cache, so each token costs a pass over the whole text: .*token 5 of 32 is off by"):
        text = model.generate("the people", 12)
    ids = model.encode("the people")
    for _ in range(12):
        ids.append(int(model.logits(ids)[-1, : model.tokenizer.vocab_size].argmax()))
    assert text == model.decode(ids)[len("the people") :]
    with warnings.catch_warnings(action="error"):
        assert model.generate("the people", 12) == text


def test_metrics_are_columns(model: api.Model) -> None:
    file = metrics.JsonLines(model.folder.metrics)
    file.write({"progress/step": 1, "train/loss": 3.5})
    file.write({"progress/step": 1, "val/loss": float("nan"), "note": "text"})
    file.write({"progress/step": 2, "train/loss": 2})
    file.close()
    table = api.metrics(model.folder.path)
    assert list(table) == ["progress/step", "train/loss", "val/loss"]
    np.testing.assert_array_equal(table["train/loss"], [3.5, np.nan, 2.0])
    np.testing.assert_array_equal(table["progress/step"], [1, 1, 2])


def test_what_is_refused_is_a_sentence(model: api.Model) -> None:
    assert "there is no run folder nowhere →" in sentence(lambda: api.load("nowhere"))
    assert "has no checkpoint of step 4 → it has 3 and 7" in sentence(lambda: api.load(model.folder.path, step=4))
    assert "ids lie in 0…391, model.vocab_size = 391 → use encode" in sentence(lambda: model.logits([0, 391]))
    assert "33 ids are more than the learned positions, 32" in sentence(lambda: model.logits(list(range(33))))
    assert "ids have the shape (0,)" in sentence(lambda: model.logits([]))
    assert "blocks.2 is not a block of" in sentence(lambda: model.attention([1, 2], 2))
    assert "temperature = -1 does not work" in sentence(lambda: model.generate("a", temperature=-1))


@pytest.mark.slow
def test_it_is_installed_and_works_in_any_directory(tmp_path: Path) -> None:
    """`pip install -e .` into a fresh virtual environment that sees this one's packages; no index is asked."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "base.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT]
    subprocess.run(install, check=True)
    code = "from research import ROOT, api; print(ROOT, api.Model.__name__)"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert re.fullmatch(rf"{re.escape(str(ROOT))} Model\n", found.stdout)


def test_a_run_of_another_checkout_is_trusted_once(tmp_path: Path) -> None:
    """It has no mark: its text is not read, until trust=True, which writes the mark and says so."""
    run = untrained.make(tmp_path)
    (run.path / "made_here").unlink()
    assert sentence(lambda: api.load(run.path)).endswith("→ if it is yours, add --trust; in Python: api.load(run, trust=True)")
    with pytest.warns(UserWarning, match=f"{run.title} counts as a run of this checkout from now on") as said:
        api.load(run.path, trust=True)
    with warnings.catch_warnings(action="error"):
        api.load(run.path)
        api.load(run.path, trust=True)
    assert len(said) == 1
