"""Import and export: reads and writes Hugging Face folders, reads GGUF files, and certifies that both models have the same logits."""
