"""Models: layers built on the sliced layers of `parallel/`, and the list of layers that becomes a model or a pipeline."""
