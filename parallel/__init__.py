"""How a tensor is cut, and who runs the pieces. Imports nothing: every file is imported by its own name."""
