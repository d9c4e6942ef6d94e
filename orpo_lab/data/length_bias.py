"""Length bias: how often the longer answer is the chosen one, and what a guess by length is worth.

People and models often prefer the longer answer. A model that has learnt no more than that has a
high preference accuracy all the same. So every report shows what a guess by length alone reaches.
"""

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

Array = NDArray[np.float64]
Sizes = NDArray[np.int64]

# Rows that are read at a time
ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class LengthBias:
    """Numbers of pairs, by which of their answers has more tokens."""

    num_longer: int
    """The chosen answer is the longer one."""
    num_shorter: int
    """The chosen answer is the shorter one."""
    num_ties: int
    """Both answers have the same length."""

    @property
    def rule(self) -> str | None:
        """The answer to guess, `longer` or `shorter`: what is chosen more often; None: no pairs."""
        if not self.num_longer + self.num_shorter + self.num_ties:
            return None
        return "longer" if self.num_longer >= self.num_shorter else "shorter"

    def guess(self, chosen: Sizes, rejected: Sizes) -> Array:
        """Return for each pair whether a guess by the rule is right, [N]: 1, 0, or 0.5 for a tie.

        Where both answers have the same length, a guess is the toss of a coin.
        """
        sign = np.sign(chosen - rejected) * (1 if self.rule == "longer" else -1)
        return (1 + sign) / 2


def count(chosen: Sizes, rejected: Sizes) -> LengthBias:
    """Count the pairs by which answer is the longer one.

    Args:
        chosen: number of tokens of each chosen answer, [N]. 0: the row is a single completion.
        rejected: number of tokens of each rejected answer, [N].

    If no row has both answers, every desirable completion is compared with every other one.
    """
    is_pair = (chosen > 0) & (rejected > 0)
    if is_pair.any():
        wins = np.sign(chosen[is_pair] - rejected[is_pair])
        return LengthBias(*(int((wins == sign).sum()) for sign in (1, -1, 0)))
    good, bad = chosen[chosen > 0], np.sort(rejected[rejected > 0])
    num_longer = int(np.searchsorted(bad, good, "left").sum())
    num_shorter = int((len(bad) - np.searchsorted(bad, good, "right")).sum())
    return LengthBias(num_longer, num_shorter, len(good) * len(bad) - num_longer - num_shorter)


def sizes(pairs: datasets.Dataset) -> tuple[Sizes, Sizes, Sizes]:
    """Return the numbers of tokens of prompts, chosen and rejected answers, [N] each."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    batches = pairs.select_columns(columns).with_format("arrow").iter(ROWS_PER_BATCH)
    found = [
        [pc.list_value_length(batch[name]).to_numpy() for name in columns] for batch in batches
    ]
    prompt, chosen, rejected = (
        np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True)
    )
    return prompt, chosen, rejected


def guess(train: datasets.Dataset, held_out: datasets.Dataset) -> Array | None:
    """Return whether a guess by length is right at each held-out pair, [N]; see `LengthBias.guess`.

    The rule is fixed on the training pairs. None: there is no pair to fix the rule on.
    """
    bias = count(*sizes(train)[1:])
    return bias.guess(*sizes(held_out)[1:]) if bias.rule else None
