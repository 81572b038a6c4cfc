"""What is recorded of a run: its folder, metrics.jsonl, the terminal, Weights & Biases, plots."""
