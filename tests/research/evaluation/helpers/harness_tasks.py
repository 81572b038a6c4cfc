"""lm-evaluation-harness' task definitions for local files: its YAML with `dataset_path: json`. Imports no lm_eval."""

import json
from pathlib import Path
from typing import Any

LAMBADA = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
BLIMP = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "metric_list": [{"metric": "acc"}],
}
HELLASWAG = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
}
WIKITEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "!function lm_eval.tasks.wikitext.preprocess_wikitext.wikitext_detokenizer",
    "process_results": "!function lm_eval.tasks.wikitext.preprocess_wikitext.process_results",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
CONTINUE = {
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}


def write(folder: Path, name: str, definition: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes FOLDER/NAME.yaml and FOLDER/NAME.jsonl; returns the folder."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    fields = {"task": name, **files, **definition}
    lines = [f"{key}: {value if str(value).startswith('!function') else json.dumps(value)}" for key, value in fields.items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
