"""An HTTP server for a trained model with OpenAI's interface: one thread runs the model, an event loop in another one speaks HTTP."""
