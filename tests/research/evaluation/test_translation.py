"""The task translation: what a model is given, figures by sacrebleu itself, baselines, beams, and the whole verb."""

import json

import pytest

from models.inference.beam_search import BeamSearchParams, beam_search
from research.cli import evaluate
from research.config import Pairs, serialization
from research.data import tokenizer
from research.data.pair_text import Pair
from research.data.run_tokenizer import load_tokenizer
from research.evaluation import translation
from research.evaluation.session import Session
from research.evaluation.task import Settings, TaskContext
from research.evaluation.translation import Translation, create_task, metrics_of, request_of
from research.tracking.own_runs import mark_as_own
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence, t5

sacrebleu = pytest.importorskip("sacrebleu")
BYTES = tokenizer.fixed("builtin:bytes+sep")
PAIRS = [("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch")]


def lines_of(pairs):
    return "".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of pairs with large random weights."""
    place = tmp_path_factory.mktemp("translation")
    (place / "pairs.jsonl").write_text(lines_of(PAIRS * 4), encoding="utf-8")
    made = untrained.make(place, seq_length=48, vocab_size=300)
    experiment = serialization.load(made.config)
    changes = dict(train=str(place / "pairs.jsonl"), validation=str(place / "pairs.jsonl"), tokenizer="builtin:bytes+sep", examples=Pairs())
    experiment.data = experiment.data.model_copy(update=changes)
    serialization.save(experiment, made.config)
    mark_as_own(made)
    return made


def context_of(run):
    data = serialization.load(run.config).data
    return TaskContext(load_tokenizer(data, run.path), 49, data, run.path, separator="<sep>")


def session_of(run, batch=3):
    return Session(run.path, run.checkpoints / "step_000003", serialization.load(run.config).model, BYTES, None, 1, batch)


def test_figures_are_sacrebleu_s():
    """As its command line gives them, which reads files, and by hand at the ends: 100 for the reference, 0 for nothing of it."""
    texts, references = ["das Haus ist groß und alt", "ein Buch"], ["das Haus ist groß und neu", "das Buch"]
    bleu, chrf = metrics_of("model", texts, references)
    assert bleu.value == sacrebleu.corpus_bleu(texts, [references]).score and chrf.value == sacrebleu.corpus_chrf(texts, [references]).score
    assert (bleu.name, chrf.name, bleu.higher_is_better) == ("bleu", "chrf", True)
    assert [metric.name for metric in metrics_of("copy", texts, references)] == ["copy/bleu", "copy/chrf"]
    assert [round(metric.value, 6) for metric in metrics_of("model", references[:1], references[:1])] == [100, 100]
    assert [metric.value for metric in metrics_of("model", ["xyz"], ["abc"])] == [0, 0]
    assert [text.split(" ")[0] for text in translation.signatures()] == ["BLEU", "chrF2"] and "version:" in translation.signatures()[0]


def test_what_a_model_is_given(run):
    """Both kinds read the source and the separator. A long source loses its end, and half of a decoder's places are for the translation."""
    context, model = context_of(run), serialization.load(run.config).model
    request, is_cut = request_of(Pair("", "ab", "x"), model, context)
    assert (request.ids, request.max_new_tokens, request.ends, is_cut) == ((97, 98, 257), 20, (256, 257), False)
    request, is_cut = request_of(Pair("", "a" * 40, "x"), model, context)
    assert (request.ids, request.max_new_tokens, is_cut) == ((*[97] * 23, 257), 24, True)
    encoder_decoder = t5(model={"source_length": 16, "seq_length": 30}).model
    request, is_cut = request_of(Pair("", "a" * 40, "x"), encoder_decoder, context)
    assert (request.ids, request.max_new_tokens, is_cut) == ((*[97] * 15, 257), 30, True)


def test_the_verb_translates_keeps_and_compares(run, tmp_path, capsys):
    """The dictionary has learned the training pairs by heart, and the model writes what greedy search and beam search give."""
    path = tmp_path / "held_out.jsonl"
    path.write_text(lines_of([("the house", "das Haus"), ("a book!", "ein Buch!"), ("x" * 60, "y")]), encoding="utf-8")
    found = {}
    for beams in ([], ["--beams", "3"]):
        evaluate.main([str(run.path), "--tasks", f"translation:{path}", "--json", *beams])
        out, err = capsys.readouterr()
        (row,) = map(json.loads, out.splitlines())
        assert "metrics  sacrebleu · BLEU nrefs:1" in err and row["settings"]["sacrebleu"].startswith("BLEU nrefs:1|case:mixed")
        found[len(beams)] = {name: figure["value"] for name, figure in row["metrics"].items()}
        assert row["examples"] == 3 and found[len(beams)]["sources_cut"] == 1
    kept = {
        beams: [json.loads(line) for line in (run.path / "evaluations" / "translations" / name).read_text("utf-8").splitlines()]
        for beams, name in ((0, "step_000003-held_out-beams1.jsonl"), (2, "step_000003-held_out-beams3.jsonl"))
    }
    references = [row["reference"] for row in kept[0]]
    assert [row["dictionary"] for row in kept[0]] == ["das Haus", "ein Buch!", "x" * 60] and kept[0][0]["copy"] == "the house"
    for beams, rows in kept.items():
        for who, prefix in (("model", ""), ("untrained", "untrained/"), ("dictionary", "dictionary/")):
            texts = [row[who] for row in rows]
            assert found[beams][f"{prefix}chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
    own = [{who: [row[who] for row in rows] for who in ("model", "untrained")} for rows in kept.values()]
    assert own[0]["untrained"] == own[1]["untrained"] and own[0]["untrained"] != own[0]["model"] != own[1]["model"]
    requests = [request_of(Pair("", row["source"], ""), serialization.load(run.config).model, context_of(run))[0] for row in kept[0]]
    with session_of(run) as session:
        for request, text in zip(requests, own[1]["model"], strict=True):
            params = BeamSearchParams(3, request.max_new_tokens, request.ends, 258)
            [best, *_] = beam_search(session.generator.decoder, request.ids, params)
            assert bytes(best.ids[: -1 if best.ended else None]).decode(errors="replace").rstrip("\ufffd") == text.rstrip("\ufffd")


def test_mistakes(run, tmp_path):
    experiment = serialization.load(run.config)
    assert "needs a run that was trained on pairs" in sentence(
        lambda: create_task("translation", Settings(), None, _without_pairs(experiment))
    )
    assert "--beams 0 does not work" in sentence(lambda: create_task("translation", Settings(), 0, experiment))
    assert "a.txt is not a kind of file" in sentence(lambda: create_task(f"translation:{tmp_path}/a.txt", Settings(), 1, experiment))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "alone"}\n')
    task = create_task(f"translation:{path}", Settings(), 1, experiment)
    assert "document 1 of" in sentence(task.pairs) and "is no pair → write one object a line" in sentence(task.pairs)
    path.write_text('{"source": "a"}\n')
    assert 'a.jsonl, line 1 has no "target"' in sentence(task.pairs)
    builtin = Translation("translation", translation.BUILTIN, Settings(limit=2), 1).pairs()
    assert len(builtin) == 2 and builtin[0].target
    with session_of(run, 2) as session:
        request, _ = request_of(builtin[0], experiment.model, context_of(run))
        assert "--beams 4 needs as many texts at once, and --batch is 2" in sentence(lambda: session.texts([request], beams=4))


def _without_pairs(experiment):
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"examples": "packed"})})


def test_names():
    assert translation.is_name("translation") and translation.is_name("translation:a.jsonl")
    assert not translation.is_name("translation:") and not translation.is_name("translations")
