"""What is computed: layers written on `parallel/`, and the list of layers that becomes a model or a pipeline."""
