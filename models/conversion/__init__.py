"""Settings and weights of other libraries' checkpoints (transformers, GGUF) mapped to ours, and back."""
