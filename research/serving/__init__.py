"""A trained model behind OpenAI's HTTP interface: one thread writes, an event loop speaks."""
