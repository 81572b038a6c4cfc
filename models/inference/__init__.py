"""Decoding and scoring with a trained model: KV cache, sampling, beam search, and the driver of several tensor ranks."""
