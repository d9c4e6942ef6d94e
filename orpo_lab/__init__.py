"""orpo_lab: ORPO experiments (Hong, Lee and Thorne 2024, arXiv:2403.07691) that compare.

Deliberately imports nothing: `python launch.py --help` and the refusal of a typo must stay fast.
A run starts in `orpo_lab.run.train`.
"""

__version__ = "0.1.0"
