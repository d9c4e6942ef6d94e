"""Texts that are nearly the same: which are found, and what a group is."""

import random
import sys

import pytest

from orpo_lab.data.near_duplicates import THRESHOLD, near_duplicates, shingles
from orpo_lab.data.splits import normalize
from orpo_lab.errors import UserError

WORDS = [f"word{number}" for number in range(400)]


def changed(text: str, num: int, rng: random.Random) -> str:
    """Return a text with some of its words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), num):
        words[place] = f"new{rng.random()}"
    return " ".join(words)


def likeness(one: str, other: str) -> float:
    a, b = shingles(normalize(one)), shingles(normalize(other))
    return len(a & b) / len(a | b)


def test_texts_well_above_the_threshold_are_found_and_texts_well_below_are_not() -> None:
    rng = random.Random(0)
    texts: list[str] = []
    expected: list[list[int]] = []
    for number in range(40):
        text = " ".join(rng.choices(WORDS, k=100))
        other = changed(text, 2 if number % 2 else 9, rng)
        if likeness(text, other) >= THRESHOLD + 0.08:
            expected.append([len(texts), len(texts) + 1])
        else:
            assert likeness(text, other) <= THRESHOLD - 0.08
        texts += [text, other]
    assert len(expected) == 20
    assert near_duplicates(texts) == expected


def test_case_space_and_unicode_form_make_no_other_text() -> None:
    texts = ["What is  2 + 2?", "no", "what is 2 + 2?", "WHAT IS \uff12 + 2?", "yes"]
    assert near_duplicates(texts) == [[0, 2, 3]]


def test_a_chain_of_small_changes_does_not_make_one_group() -> None:
    words = list(WORDS[:60])
    chain = []
    for number in range(60):
        chain.append(" ".join(words))
        words[number] = f"new{number}"
    groups = near_duplicates(chain)
    assert len(groups) > 3
    assert all(
        likeness(chain[group[0]], chain[place]) > 0.65 for group in groups for place in group
    )


def test_a_text_without_spaces_is_compared_by_its_characters() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(80))
    assert near_duplicates([text, text[:78] + "吗吗", text[::-1]]) == [[0, 1]]


def test_short_texts_are_whole_shingles() -> None:
    assert shingles("add this") == {b"add this"}
    assert shingles("a b c d") == {b"a b c", b"b c d"}
    assert near_duplicates(["add this", "add that", "", "", "hi"]) == [[2, 3]]


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[curate\]"'):
        near_duplicates(["a", "b"])
