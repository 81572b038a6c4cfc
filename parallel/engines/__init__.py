"""DeepSpeed's engines behind one interface. Importing this package imports nothing else: deepspeed_config must stay usable without torch."""
