"""Train a model, from a run's first step to its last step; begin to read at `loop`."""
