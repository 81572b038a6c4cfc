"""DeepSpeed's engines behind one interface. This file imports nothing: deepspeed_config must stay usable without torch."""
