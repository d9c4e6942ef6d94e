"""Mismatched completions: those of another prompt, on which KTO measures how far a model has moved.

TRL takes the completion of the example before in the micro-batch. Here each pair gets the
completions of the pair before it in the data, once for the whole run. So the reference of the
mismatched completions can be computed before training, as that of all others.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import datasets

from orpo_lab.data import Data
from orpo_lab.data.encode import MASKS
from orpo_lab.engine.base import COLUMNS, MISMATCHED, REFERENCE, Pair
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

SIDES = [*COLUMNS[1:], *MASKS]


def attach(data: Data, splits: Sequence[str], max_length: int) -> Data:
    """Return the pairs with the column MISMATCHED in some splits.

    Args:
        data: tokenized pairs.
        splits: the fields of `data` whose pairs get the column.
        max_length: the largest number of tokens of a prompt with a completion. A mismatched
            completion that does not fit loses its end.

    Raises:
        UserError: all pairs of a split have the same prompt.
    """
    changed = {split: _attached(split, getattr(data, split), max_length) for split in splits}
    return replace(data, **changed)


def _attached(name: str, pairs: datasets.Dataset, max_length: int) -> datasets.Dataset:
    prompts: list[list[int]] = pairs["prompt_ids"][:]
    if all(prompt == prompts[0] for prompt in prompts):
        raise UserError(
            f"method=kto reads a prompt with the completions of another prompt, and the {name} "
            f"pairs have a single one ({len(prompts)} pairs); give more prompts, by the data or by "
            f"dataset.num_{'train' if name == 'train' else 'eval'}"
        )
    sides = [name for name in SIDES if name in pairs.column_names]
    others = pairs.select(partners(prompts)).select_columns(sides).to_list()
    rooms = [max_length - len(prompt) for prompt in prompts]
    num_cut = sum(
        max(map(len, other.values())) > room for other, room in zip(others, rooms, strict=True)
    )
    if num_cut:
        log.info("%s: %d of %d mismatched pairs are cut to fit", name, num_cut, len(prompts))
    column = [
        {side: ids[:room] for side, ids in other.items()}
        for other, room in zip(others, rooms, strict=True)
    ]
    return pairs.add_column(MISMATCHED, column)


def partners(prompts: Sequence[list[int]]) -> list[int]:
    """Return for each pair the nearest pair before it that has another prompt, cyclically.

    Args:
        prompts: token ids of each pair's prompt; not all are the same.
    """
    found: list[int] = []
    for i, prompt in enumerate(prompts):
        before = i - 1
        while prompts[before] == prompt:
            before -= 1
        found.append(before % len(prompts))
    return found


def all_of(pairs: datasets.Dataset) -> datasets.Dataset:
    """Return all mismatched pairs: the prompts, with the completions of MISMATCHED."""
    flat = pairs.select_columns(["prompt_ids", MISMATCHED]).flatten()
    return flat.rename_columns(
        {name: name.removeprefix(f"{MISMATCHED}.") for name in flat.column_names}
    )


def of(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the mismatched pairs of some pairs, with their own reference."""
    return [{**pair, **pair[MISMATCHED], REFERENCE: pair[REFERENCE][2:]} for pair in pairs]
