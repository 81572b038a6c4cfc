"""How much of the samples whole conversations fill, when they are packed by best fit: of chatterbot-corpus, or of conversations of yours.

    pip install --no-deps --target chatterbot chatterbot-corpus
    python benchmarks/packing.py chatterbot/chatterbot_corpus/data/english [--tokenizer builtin:gpt2] [--length 256]
    python benchmarks/packing.py chats.jsonl --tokenizer FOLDER

A folder of chatterbot-corpus (BSD-3) holds YAML files with lists of turns, which become messages of user and assistant in turn; a last turn
of the user is left out, and so are conversations with an empty turn. They are prepared as `prepare --supervised` does, into a temporary
folder. Prints what SupervisedExamples says of the corpus: the share of places used, and the examples that are truncated.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from research.cli import prepare
from research.cli.verbs import count
from research.cluster.exit_codes import refusing
from research.data import tokenizer_file
from research.data.supervised import SupervisedExamples
from research.data.token_store import TokenStore


def conversations(folder: Path) -> list[list[dict[str, str]]]:
    """The conversations of chatterbot's YAML files in a folder."""
    found = []
    for path in sorted(folder.rglob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", []):
            said = [str(turn) for turn in turns if turn is not None]
            said = said[: len(said) - len(said) % 2]
            if said and all(text.strip() for text in said):
                found.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)])
    return found


def main() -> None:
    """Prepares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--tokenizer", default="builtin:gpt2")
    parser.add_argument("--length", type=count, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = arguments.conversations
        if file.is_dir():
            file = Path(place) / "chats.jsonl"
            lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations(arguments.conversations))
            file.write_text("".join(lines), encoding="utf-8")
        words = ["--supervised", "--as", "chats", "--split", "100", "--tokenizer", arguments.tokenizer, "--corpora", place]
        prepare.main([str(file), *words])
        corpus = Path(place) / "chats"
        tokenizer = tokenizer_file.load(str(corpus / "tokenizer.json"), Path())
        print(SupervisedExamples(TokenStore(corpus / "train"), tokenizer, arguments.length, 0).summary)


if __name__ == "__main__":
    with refusing():
        main()
