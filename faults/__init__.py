"""The fault suite: what can go wrong with a run is made to happen, and what comes of it judged.

`make faults` (or `python -m faults`) runs it; docs/reliability.md has its last table.
Read `judge.py` for what counts, then any module of `families/`.
"""
