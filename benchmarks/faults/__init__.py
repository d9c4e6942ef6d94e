"""The fault suite: what can go wrong with a run is made to happen, and what the run made of it is judged.

`python -m benchmarks.faults` (or `make faults`) runs it; docs/reliability.md has its last table. Read
`judge.py` for what counts, then any module of `families/`.
"""
