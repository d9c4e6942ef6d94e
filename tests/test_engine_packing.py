"""Rows of pairs, and what of them is scored."""

import random

import torch

from orpo_lab.engine.packing import Collator, is_one_pair, pack, tokens_of

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


def test_one_pair_cannot_be_made_smaller_and_two_can() -> None:
    assert is_one_pair(collator().lay_out(PAIRS[:1]))
    assert not is_one_pair(collator().lay_out(PAIRS))


def test_a_pair_is_laid_out_once_and_scored_where_it_is_predicted() -> None:
    (row,) = collator()(PAIRS)["micro_batches"]
    assert row["sizes"] == [(3, 2, 1), (1, 1, 2)]
    assert row["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 14, 23, 32, 33]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    predicted = list(zip(row["sources"].tolist(), row["targets"].tolist(), strict=True))
    first = [(0, 12), (1, 13), (2, 21), (3, 22), (2, 31)]
    assert predicted == [*first, (6, 23), (6, 32), (8, 33)]
    assert row["sums"].tolist() == [0, 0, 1, 1, 2, 4, 5, 5]
    assert row["counts"].tolist() == [[2, 2, 1], [0, 1, 2]]


def test_a_prompt_that_is_not_in_the_objective_is_not_scored() -> None:
    (row,) = collator(prompt_is_scored=False)(PAIRS)["micro_batches"]
    assert row["targets"].tolist() == [21, 22, 31, 23, 32, 33]
    assert row["counts"].tolist() == [[0, 2, 1], [0, 1, 2]]


def test_padding_is_never_scored_and_the_step_is_counted_whole() -> None:
    batch = collator(budget=6, multiple=8)(PAIRS)
    assert [row["input_ids"].shape for row in batch["micro_batches"]] == [(1, 8), (1, 8)]
    assert all(int(row["sources"].max()) < 6 for row in batch["micro_batches"])
    assert batch["counts"].tolist() == [[2, 2, 1], [0, 1, 2]]
    assert torch.equal(batch["counts"], torch.cat([r["counts"] for r in batch["micro_batches"]]))


def test_a_step_is_packed_anew_for_a_lower_budget_as_if_it_had_been_so() -> None:
    # Of equal lengths the order that they were given in decides
    sizes = [(1, 2, 3), (2, 2, 1), (4, 4, 4), (1, 1, 3), (3, 1, 2), (2, 2, 2)]
    ids = iter(range(1, 1000))
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        {key: [next(ids) for _ in range(size)] for key, size in zip(columns, one, strict=True)}
        for one in sizes
    ]
    step = collator(budget=18)(pairs)
    # The last one is below two of the three rows, and that of a pair which no row can be below
    for budget in (18, 17, 11, 6):
        lowered = collator(budget=budget)
        found, expected = lowered.within_budget(step), lowered(pairs)
        assert found["rows"] == expected["rows"]
        assert torch.equal(found["counts"], expected["counts"])
        for one, other in zip(found["micro_batches"], expected["micro_batches"], strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["targets"], other["targets"])
            assert tokens_of(one) <= max(budget, 12)
