"""Import and export: transformers' folders and GGUF files, with a parity certificate."""
