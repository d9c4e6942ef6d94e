"""Planted faults: mistakes that a tired programmer would make, and whether a test sees them.

`python -m faults.planted` plants every fault of `lists/*.toml` in a copy of the working tree
and runs the quick tests that are named beside it. Read `catalogue.py` for what a fault is, then
`trial.py` for what counts as seen.
"""
