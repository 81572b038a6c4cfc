"""Text generation: settings, prompts, batching, and restoring a decoder from a checkpoint."""
