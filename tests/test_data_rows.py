"""Rows that wait to be drawn: what is held in memory, and what is found out from digests alone."""

import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orpo_lab.data import rows as waiting
from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Pair
from orpo_lab.data.rows import DIGEST_BYTES, RECORD, Row, Rows, are_in, digest
from orpo_lab.data.splits import paired


def row(number: int, prompt: Any, chosen: str = "yes", label: bool | None = None) -> Row:
    return Row(number, Pair(prompt, chosen, "no", label=label), {})


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


def test_memory_grows_by_digests_and_not_by_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_WAITING_BYTES", 2**16)
    num, size = 2000, 10_000

    def many() -> Iterator[Row]:
        for number in range(num):
            yield row(number, f"{number} " + "x" * size)

    tracemalloc.start()
    try:
        rows = Rows(many())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < num * 2 * RECORD.itemsize + 2**17
    assert peak < num * size / 20
    assert str(rows[1234].pair.prompt).startswith("1234 x")


def test_a_row_comes_back_as_it_was_with_what_was_noted_since() -> None:
    context = {"tools": [{"name": "add", "default": None}]}
    before = Row(7, Pair(turns("a"), "\u00fc", "b", context=context, repeated=True), {"answer": 3})
    before.kept_despite.append(Fault("unknown_role", "has role judge"))
    rows = Rows([row(0, "q"), before])
    rows.note(1, [Fault("duplicate", "is line 3 once more")])
    chosen = rows.select(np.array([1]))
    assert chosen[0].pair == before.pair
    assert (chosen[0].number, chosen[0].checks) == (7, {"answer": 3})
    assert [fault.name for fault in chosen[0].kept_despite] == ["unknown_role", "duplicate"]


def test_digests_sort_and_compare_as_their_bytes_do() -> None:
    rng = random.Random(0)
    found = [rng.randbytes(DIGEST_BYTES) for _ in range(500)]
    found += [
        rng.randbytes(3) + bytes(DIGEST_BYTES - 3),
        bytes(DIGEST_BYTES),
        b"\xff" * DIGEST_BYTES,
    ]
    digests = np.array(found, f"S{DIGEST_BYTES}")
    assert [bytes(each).ljust(DIGEST_BYTES, b"\0") for each in np.sort(digests)] == sorted(found)
    assert are_in(digests[:9], digests[4:]).tolist() == [False] * 4 + [True] * 5
    assert not are_in(digests, digests[:0]).any()


def test_a_root_is_the_shortest_prompt_that_begins_a_conversation() -> None:
    prompts = [turns("a", "b", "c"), turns("A "), turns("x", "b", "c"), "a", turns("a", "b", "d")]
    rows = Rows(row(number, prompt) for number, prompt in enumerate(prompts))
    whole = digest("x b c")
    assert rows.roots().tolist() == [digest("a"), digest("a"), whole, digest("a"), digest("a")]
    # Without the short prompts nothing begins the others
    alone = rows.select(np.array([0, 2, 4]))
    assert alone.roots().tolist() == [digest("a b c"), whole, digest("a b d")]


def test_completions_make_pairs_in_the_order_of_their_prompts() -> None:
    labels = [("q", True), ("p", False), ("q", False), ("p", True), ("q", True), ("r", True)]
    rows = Rows(row(at, prompt, str(at), label) for at, (prompt, label) in enumerate(labels))
    assert rows.make_pairs().tolist() == [True] * 5 + [False]
    pairs = paired(rows)
    assert [(pair.pair.prompt, pair.number, pair.pair.label) for pair in pairs] == [
        ("q", 0, None),
        ("p", 3, None),
    ]
    assert paired(pairs) is pairs
