"""How a question is put to a model and answered: configuration, data, the loop, tracking, reports."""
