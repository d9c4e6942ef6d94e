"""What is worth knowing of preference data before training, as figures; nothing is drawn here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from orpo_lab.compare.guess import share_right
from orpo_lab.compare.verdict import Interval, share_interval
from orpo_lab.config.dataset import Dataset
from orpo_lab.data import Data
from orpo_lab.data.encode import SIZES
from orpo_lab.data.length_bias import LengthBias, Sizes, count, sizes
from orpo_lab.data.near_duplicates import near_duplicates
from orpo_lab.data.pairs import num_shared
from orpo_lab.errors import UserError

PERCENTILES = (5, 25, 50, 75, 95, 99)
# The first `max_length` that is looked at. Each of the others is twice the one before
SHORTEST = 128
# How many near-duplicates are quoted
NUM_QUOTED = 3


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of prompts, chosen and rejected answers before any cut, [N] each.

    N is the number of rows that were tokenized: also those that turned out too long.
    """

    prompt: Sizes
    chosen: Sizes
    rejected: Sizes

    @classmethod
    def of(cls, judged: datasets.Dataset) -> "Lengths":
        """Take the lengths from what `encode_row` returned; rows without tokens have none."""
        found = np.array([judged[name][:] for name in SIZES], dtype=np.int64).reshape(
            len(SIZES), -1
        )
        return cls(*found[:, found[0] > 0])

    def __add__(self, other: "Lengths") -> "Lengths":
        """Return the lengths of both, one after the other."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Lengths(*(np.concatenate(parts) for parts in both))

    @property
    def longest(self) -> Sizes:
        """The longer answer of each row, [N]."""
        return np.maximum(self.chosen, self.rejected)

    def percentiles(self) -> dict[str, dict[str, int]]:
        """Return for each part of a row the PERCENTILES and the maximum; each is a row's length."""
        found = {}
        for name, lengths in vars(self).items():
            values = np.percentile(lengths, (*PERCENTILES, 100), method="higher").tolist()
            keys = [*(f"p{percent}" for percent in PERCENTILES), "max"]
            found[name] = dict(zip(keys, values, strict=True))
        return found


def fates(lengths: Lengths, dataset: Dataset) -> dict[str, int]:
    """Return how many rows `data.encode.fit` keeps whole, cuts and drops.

    A pair whose answers a cut makes equal is dropped too, but it counts as cut here: only its
    tokens would tell.
    """
    prompt, limit = lengths.prompt, dataset.max_prompt_length
    room = np.minimum(limit, dataset.max_length - lengths.longest)
    is_whole = prompt <= room
    match dataset.overlong:
        case "cut_prompt":
            may_cut = room >= 2
        case "cut_completion":
            may_cut = prompt <= limit
        case _:
            may_cut = np.zeros(len(prompt), dtype=bool)
    num_kept, num_cut = int(is_whole.sum()), int((~is_whole & may_cut).sum())
    return {"kept": num_kept, "cut": num_cut, "dropped": len(prompt) - num_kept - num_cut}


def candidates(
    lengths: Lengths, configured: Dataset, of_length: Callable[[int], Dataset | None]
) -> list[dict[str, int]]:
    """Return what each `max_length` would keep: powers of two up to one that keeps all rows.

    Args:
        lengths: of the training rows.
        configured: with the configured `max_length`, which is among the others.
        of_length: returns the configuration with another `max_length`; None: it is refused.
    """
    found = {configured.max_length: configured}
    length, longest = SHORTEST, int((lengths.prompt + lengths.longest).max())
    # Half of twice the longest row has room for every prompt
    while length < 4 * longest:
        other = of_length(length)
        if other is None and length > configured.max_length:
            break  # above the model's context
        if other is not None:
            found.setdefault(length, other)
            if not fates(lengths, other)["dropped"] + fates(lengths, other)["cut"]:
                break
        length *= 2
    return [
        {"max_length": length, "max_prompt_length": found[length].max_prompt_length}
        | fates(lengths, found[length])
        for length in sorted(found)
    ]


def length_bias(data: Data) -> dict[str, Any] | None:
    """Return how often the longer answer is the chosen one, and what a guess by that reaches.

    None: the training rows have no pair to count.
    """
    bias = count(*sizes(data.train)[1:])
    if bias.rule is None:
        return None
    right = bias.guess(*sizes(data.held_out)[1:])
    return {
        **vars(bias),
        "longer_is_chosen": share_of(bias).as_json(),
        "rule": bias.rule,
        "length_guess_accuracy": share_right(right).as_json(),
        "num_held_out": len(right),
    }


def share_of(bias: LengthBias) -> Interval:
    """Return how often the longer answer is the chosen one, without ties; Wilson's interval.

    Of ties alone the share is 0.5, from 0 to 1.
    """
    num = bias.num_longer + bias.num_shorter
    return share_interval(bias.num_longer, num) if num else Interval(0.5, 0.0, 1.0)


def duplicates(data: Data) -> dict[str, Any]:
    """Return how many prompts are nearly the same, with examples; `missing` if it is not known.

    Each prompt counts once. What all prompts share (the chat template) is left out.
    """
    train, held_out = (
        [*dict.fromkeys(split["prompt_text"][:])] for split in (data.train, data.held_out)
    )
    texts = [*train, *held_out]
    try:
        groups = near_duplicates(without_shared(texts))
    except UserError as error:
        return {"missing": str(error)}
    in_train = [[place for place in group if place < len(train)] for group in groups]
    leaks = [
        (ours[0], place)
        for group, ours in zip(groups, in_train, strict=True)
        for place in group[len(ours) :]
        if ours
    ]
    repeats = [(first, place) for first, *rest in filter(None, in_train) for place in rest]
    return {
        "num_prompts": len(train),
        "num_near_duplicates": len(repeats),
        "num_held_out": len(held_out),
        "num_held_out_near_train": len(leaks),
        "examples": [
            [texts[one], texts[other]]
            for one, other in [*leaks[:NUM_QUOTED], *repeats[:NUM_QUOTED]]
        ],
    }


def without_shared(texts: Sequence[str]) -> list[str]:
    """Return texts without the beginning and the end that all of them share."""
    if len(set(texts)) < 2:
        return [*texts]
    start = _num_shared(texts)
    rests = [text[start:] for text in texts]
    end = _num_shared([rest[::-1] for rest in rests])
    return [rest[: len(rest) - end] for rest in rests]


def _num_shared(texts: Sequence[str]) -> int:
    """Return how many characters all texts begin with: as many as the first and last in order."""
    return num_shared(min(texts), max(texts))
