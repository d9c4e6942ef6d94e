"""Rows of pairs, and what of them is scored."""

import random

import pytest
import torch

from orpo_lab.engine.packing import Collator, by_length, halved, pack

PAIRS = [
    {"prompt_ids": [11, 12, 13], "chosen_ids": [21, 22], "rejected_ids": [31]},
    {"prompt_ids": [14], "chosen_ids": [23], "rejected_ids": [32, 33]},
]


def collator(*, budget: int = 100, multiple: int = 1, prompt_is_scored: bool = True) -> Collator:
    return Collator(
        budget=budget, multiple=multiple, prompt_is_scored=prompt_is_scored, pad_token_id=0
    )


def test_every_pair_is_packed_once_and_no_row_exceeds_the_budget() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        lengths = [numbers.randint(1, 60) for _ in range(numbers.randint(1, 40))]
        budget = numbers.randint(60, 300)
        rows = pack(lengths, budget)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        sizes = sorted(sum(lengths[i] for i in row) for row in rows)
        assert sizes[-1] <= budget
        # No two rows would fit into one
        assert len(sizes) == 1 or sizes[0] + sizes[1] > budget


def test_a_pair_above_the_budget_has_a_row_to_itself() -> None:
    assert pack([5, 50, 5], 10) == [[1], [0, 2]]


def test_a_budget_is_halved_until_every_row_is_one_pair() -> None:
    short, long = (3, 2, 1), (10, 20, 30)
    assert halved(100, [[short, short], [long]]) == 30, "the widest row is narrower than the budget"
    assert halved(40, [[short, short], [long]]) == 20
    assert halved(100, [[short], [long]]) is None


def test_no_batch_holds_more_tokens_than_its_memory_allows() -> None:
    lengths = [1 + (37 * i) % 300 for i in range(97)] + [4097]
    batches = by_length(lengths, 4096)
    assert sorted(index for batch in batches for index in batch) == list(range(98))
    sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(sizes[1:]) <= 4096 < sizes[0]
    assert min(sizes[1:-1]) > 4096 - 300, "and none is left half empty"
    assert all(lengths[batch[0]] == max(lengths[i] for i in batch) for batch in batches)


def test_a_pair_is_laid_out_once_and_scored_where_it_is_predicted() -> None:
    (row,) = collator()(PAIRS)
    assert row["sizes"] == [(3, 2, 1), (1, 1, 2)]
    assert row["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 14, 23, 32, 33]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    predicted = list(zip(row["sources"].tolist(), row["targets"].tolist(), strict=True))
    first = [(0, 12), (1, 13), (2, 21), (3, 22), (2, 31)]
    assert predicted == [*first, (6, 23), (6, 32), (8, 33)]
    assert row["sums"].tolist() == [0, 0, 1, 1, 2, 4, 5, 5]
    assert row["counts"].tolist() == [[2, 2, 1], [0, 1, 2]]


@pytest.mark.parametrize(("multiple", "padding"), [(1, []), (8, [[0] * 6])])
def test_keys_are_spread_so_that_each_completion_stands_behind_its_prompt(
    multiple: int, padding: list[list[int]]
) -> None:
    (row,) = collator(multiple=multiple)(PAIRS)
    ids, places = row["input_ids"][0], row["places"]
    keys = ids[places].split(row["cu_seq_k"].diff().tolist())
    first_pair, second_pair = [[11, 12, 13, 21, 22], [11, 12, 13, 31]], [[14, 23], [14, 32, 33]]
    assert [each.tolist() for each in keys] == first_pair + second_pair + padding
    queries = ids.split(row["cu_seq_q"].diff().tolist())
    own = [[11, 12, 13, 21, 22], [31], [14, 23], [32, 33]]
    assert [each.tolist() for each in queries] == own + padding
    # Every key goes back to its token, from one place or from two
    again = row["second"] >= 0
    assert again.nonzero()[:, 0].tolist() == [0, 1, 2, 6]
    assert torch.equal(places[row["first"]], torch.arange(len(ids)))
    assert torch.equal(places[row["second"][again]], torch.arange(len(ids))[again])
    assert len({*row["first"].tolist(), *row["second"][again].tolist()}) == len(places)
    assert row["longest"] == max(map(len, keys))


def test_a_prompt_that_is_not_in_the_objective_is_not_scored() -> None:
    (row,) = collator(prompt_is_scored=False)(PAIRS)
    assert row["targets"].tolist() == [21, 22, 31, 23, 32, 33]
    assert row["counts"].tolist() == [[0, 2, 1], [0, 1, 2]]


def test_padding_is_never_scored() -> None:
    found = collator(budget=6, multiple=8)(PAIRS)
    assert [row["input_ids"].shape for row in found] == [(1, 8), (1, 8)]
    assert all(int(row["sources"].max()) < 6 for row in found)
    assert [row["counts"].tolist() for row in found] == [[[2, 2, 1]], [[0, 1, 2]]]
