"""What happens from a run's first step to its last: see `loop`."""
