"""Take the model of a run out of the lab: `python -m orpo_lab export RUN`."""
