"""Package data: the CMU dictionary, and the model trained on it."""
