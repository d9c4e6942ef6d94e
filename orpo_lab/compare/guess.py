"""A guess by length alone, beside the settings: does a model prefer better than that?

The guess needs no model. It is the longer answer or the shorter one, whichever is chosen more often
in training (see `data.length_bias`). Like the untrained model's score, its score is subtracted pair
by pair.
"""

from dataclasses import dataclass

import numpy as np

from orpo_lab.compare.evidence import Comparison, Setting
from orpo_lab.compare.untrained import Gain, listed, over_pairs
from orpo_lab.compare.verdict import Array, Interval, Measure
from orpo_lab.metrics import PREFERENCE


@dataclass(frozen=True)
class Guess:
    """A guess by length alone, and its share of right guesses."""

    name: str
    settings: list[int]
    """The numbers of the settings whose training pairs lead to this guess."""
    interval: Interval
    """The interval is over pairs."""


def guesses(comparison: Comparison) -> list[Guess]:
    """Return the guesses by length, each once.

    Settings have several guesses if they are trained on different pairs: one of the longer answer,
    one of the shorter one. Settings whose folders hold no guess have none.
    """
    members: dict[bytes, tuple[Array, list[int]]] = {}
    for number, setting in enumerate(comparison.settings):
        scores = _guess(setting)
        if scores is not None:
            members.setdefault(scores.tobytes(), (scores, []))[1].append(number)
    return [
        Guess(
            _name(comparison, numbers, is_only=len(members) == 1),
            numbers,
            share_right(scores),
        )
        for scores, numbers in members.values()
    ]


def share_right(scores: Array) -> Interval:
    """Return the share of pairs at which a guess is right, with its interval over pairs.

    Args:
        scores: 1, 0, or 0.5 where both answers have the same length, [N]; so Student's interval is
            taken, and cut to what a share can be.
    """
    found = over_pairs(scores, is_share=False)
    low, high = np.clip((found.low, found.high), 0, 1)
    return Interval(found.estimate, float(low), float(high))


def _name(comparison: Comparison, numbers: list[int], *, is_only: bool) -> str:
    name = "a guess by length alone"
    if is_only:
        return name
    return f"{name} ({listed([comparison.settings[number].name for number in numbers])})"


def gain(comparison: Comparison, number: int) -> Gain | None:
    """Return how far a setting's preference accuracy is above that of the guess by length.

    None: a run of the comparison holds no guess. The variances are pooled over all settings, as in
    the verdict. With one seed the ends of the interval are NaN.
    """
    found = [_guess(setting) for setting in comparison.settings]
    differences = [
        scores - guess
        for scores, guess in zip(comparison.accuracy.scores, found, strict=True)
        if guess is not None
    ]
    if len(differences) < len(found):
        return None
    interval = Measure(differences, is_share=False).interval(number)
    return Gain(PREFERENCE, "", is_share=True, sign=1, interval=interval)


def _guess(setting: Setting) -> Array | None:
    """Return whether the guess is right at each held-out pair, [N]: 1, 0, or 0.5 for a tie.

    None: there is no guess. The training rows were no pairs, or an earlier version of orpo_lab has
    written the run folder.
    """
    found = (setting.runs[0].scores or {}).get("length_guess")
    return None if found is None or np.isnan(found).any() else found
