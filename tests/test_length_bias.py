"""Which answer is longer, and what a guess by length alone is worth."""

import itertools

import datasets
import numpy as np
import pytest

from orpo_lab.data.length_bias import LengthBias, count, guess, sizes


def pairs(*lengths: tuple[int, int, int]) -> datasets.Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, map(list, map(range, row)), strict=True)) for row in lengths]
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in names})
    return datasets.Dataset.from_list(rows, features=features)


def test_lengths_are_numbers_of_tokens_also_of_selected_rows() -> None:
    some = pairs((1, 2, 3), (4, 5, 6), (7, 0, 8)).select([2, 0])
    assert [part.tolist() for part in sizes(some)] == [[7, 1], [0, 2], [8, 3]]


def test_pairs_are_counted_by_the_longer_answer_and_ties_apart() -> None:
    bias = count(np.array([5, 5, 2, 4]), np.array([1, 2, 3, 4]))
    assert bias == LengthBias(num_longer=2, num_shorter=1, num_ties=1)
    assert bias.rule == "longer"


def test_the_rule_is_fixed_on_the_training_pairs() -> None:
    held_out = pairs((1, 9, 2), (1, 8, 2), (1, 3, 3), (1, 2, 4))
    shorter = guess(pairs((1, 2, 5), (1, 2, 5), (1, 5, 2)), held_out)
    longer = guess(pairs((1, 5, 2)), held_out)
    assert shorter is not None
    assert shorter.tolist() == [0, 0, 0.5, 1]
    assert longer is not None
    assert longer.tolist() == [1, 1, 0.5, 0]


def test_single_completions_are_compared_each_with_each() -> None:
    good, bad = [3, 5, 5, 9], [1, 5, 7]
    wins = [np.sign(one - other) for one, other in itertools.product(good, bad)]
    bias = count(np.array([*good, 0, 0, 0]), np.array([0, 0, 0, 0, *bad]))
    assert bias == LengthBias(wins.count(1), wins.count(-1), wins.count(0))


@pytest.mark.parametrize("lengths", [[], [(1, 4, 0), (1, 3, 0)]])
def test_without_a_pair_there_is_no_guess(lengths: list[tuple[int, int, int]]) -> None:
    chosen, rejected = (np.array([row[at] for row in lengths], dtype=int) for at in (1, 2))
    assert count(chosen, rejected).rule is None
