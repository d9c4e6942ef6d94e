r"""Checkers: texts with what a reader would say their answer is, and the real math pairs."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_lab.data import checkers
from orpo_lab.data.checkers import choice, exact, last_number, reader

NUMBERS = {
    "A: 1875": "1875",
    "so 750 + 1125 = 1,875.": "1875",
    "1000": "1000",
    "1,000": "1000",
    "1000.0": "1000",
    "He pays $1,000.00!": "1000",
    "1{,}000": "1000",
    "10,\\!000": "10000",
    "1\u202f000": "1000",
    "a half is .5": "1/2",
    "0.50": "1/2",
    "1/2": "1/2",
    "½": "1/2",
    "\\frac{1}{2}": "1/2",
    "-\\frac12": "-1/2",
    "2½ cups": "5/2",
    "2 1/2 cups": "5/2",
    "1\\dfrac{3}{4}": "7/4",
    "x=-5": "-5",
    "\u22125": "-5",
    "he lost -$5": "-5",
    "he lost $-5": "-5",
    "pages (12)": "12",
    "**42**": "42",
    "$42$": "42",
    "\\(x = 42\\)": "42",
    "50%": "50",
    "50\\%.": "50",
    "5 km": "5",
    "10am": "10",
    "25 cm^2": "25",
    "25 cm²": "25",
    "25 m2": "25",
    "about 5 million people": "5000000",
    "3 hundred": "300",
    "1e6": "1000000",
    "答案是42。": "42",
    "٤٢": "42",
    "1 and 2, or 3": "3",
    # Conventions of GSM8K and of MATH, which go before the last number
    "She has 3 left.\n#### 42\nThat took 2 steps.": "42",
    "#### Step 2\nso it is 7": "7",
    "\\boxed{42}, in 3 steps": "42",
    "\\boxed{7} and then \\boxed{\\frac{3}{4}}": "3/4",
    "\\boxed{x = 5}": "5",
    "\\boxed{42 \\text{ cm}^2}": "42",
    "\\boxed{\\$18.90}": "189/10",
    "\\boxed{90^\\circ}": "90",
    "\\boxed{7": "7",
    # Not one number
    "": None,
    "no number": None,
    "in 3-5 days": None,
    "at 3:30": None,
    "1'000": None,
    "1\u2019000": None,
    "1_000": None,
    "on 12/25/2024": None,
    "version 3.11.2": None,
    "H2O": None,
    "10^5": None,
    "10²": None,
    "2**3": None,
    "2^{10}": None,
    "1.000,50": None,
    "1 000": None,
    "1,2,3": None,
    "5*20": None,
    "1/0": None,
    "9" * 61: None,
    "1e999": None,
    "3 and \\boxed{2\\sqrt{3}}": None,
    "\\boxed{3\\pi}": None,
    "\\boxed{5x}": None,
    "\\boxed{(3, 4)}": None,
    "\\boxed{\\text{four}} of 4": None,
}
LETTERS = {
    "A": "A",
    "b": "B",
    "(A)": "A",
    "(c).": "C",
    "**B**": "B",
    "A) Paris": "A",
    "B. Paris": "B",
    "Answer: A": "A",
    "ANSWER: D": "D",
    "**Answer:** C": "C",
    "The answer is (C).": "C",
    "The answer is A because it rains.": "A",
    "The answer is **B**": "B",
    "The correct choice is (a)": "A",
    "answer: option C": "C",
    "Not A. The answer is B. A dog says so.": "B",
    "First A, but the answer is B. No, the answer is C.": "C",
    "It rains.\nB": "B",
    "Option B is right": "B",
    "It is (D), since (D) is blue": "D",
    "\\boxed{A}": "A",
    "\\boxed{\\text{(D)}}": "D",
    "": None,
    "A dog barks": None,
    "Answer: A dog": None,
    "The answer is a dog.": None,
    "Answer: I think so": None,
    "I think so": None,
    "(A) Paris or (B) Rome": None,
    "AB": None,
    "The answer is A's": None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_last_number_is_read_as_a_reader_would(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(("text", "letter"), LETTERS.items())
def test_the_letter_of_a_choice_is_no_article(text: str, letter: str | None) -> None:
    assert choice(text) == letter


def test_exact_reads_the_whole_text_but_for_white_space() -> None:
    assert exact(" New\n York ") == exact("New York") == "New York"
    assert exact("new york") != exact("New York")
    assert exact(" \n") is None


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("A: (.*)", "A: one\nA:  two  words", "two words"),
        ("A: ([^ ]*)", "A: $1,875.00", "1875"),
        ("A: ([^ ]*)", "A: 22.0.", "22"),
        ("A: (.*)", "A: 3 apples", "3 apples"),
        ("A: (.*)", "A: 3-5", "3-5"),
        ("A: (.*)", "B: 3", None),
        ("A: ?(x)?", "A: y", None),
        ("A: (.*)", "A: ", None),
        (r"(\d*)", "it is 3.", "3"),
    ],
)
def test_a_pattern_reads_its_group_at_its_last_match(
    pattern: str, text: str, found: str | None
) -> None:
    assert reader("regex", pattern)(text) == found


def test_a_pattern_that_backtracks_without_end_is_broken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkers, "MAX_SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        reader("regex", "((?:a|aa)+)$")("a" * 60 + "b")
    assert time.perf_counter() - start < 5


WRITTEN = ("{}", "{:,}", "{}.0", "${:,}", "{:,}.", "\\boxed{{{:,}}}", "#### {}", "({})", "{}%")


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(WRITTEN), st.text("ab \n", max_size=5))
def test_a_number_is_the_same_however_it_is_written(number: int, form: str, before: str) -> None:
    # A letter right before a digit is a word such as H2O
    assert last_number(f"{before}\n{form.format(number)}") == str(number)


@settings(max_examples=50, deadline=None)
@given(st.decimals(-1000, 1000, allow_nan=False, places=3))
def test_decimals_are_read_exactly(number: object) -> None:
    assert last_number(f"it is {number}") == str(Fraction(str(number)))


@settings(max_examples=100, deadline=None)
@given(st.text("0123456789.,/:^*{}[]()$%-+ eEx\\boxed\nfracA#½²", max_size=60))
def test_any_text_is_read_or_is_not(text: str) -> None:
    for read in (last_number, choice, exact, reader("regex", "(.*)")):
        assert read(text) != ""
    number = last_number(text)
    assert number is None or str(Fraction(number)) == number


@pytest.mark.parametrize(("split", "num"), [("train", 581), ("test", 150)])
def test_every_chosen_answer_of_the_math_pairs_is_checked_and_no_rejected_one_passes(
    assets: Path, split: str, num: int
) -> None:
    file = assets / "data" / "math_pairs" / f"{split}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == num
    for row in rows:
        chosen = last_number(row["chosen"])
        # What the data set itself marks as the answer
        assert chosen == row["chosen"].rpartition("A:")[2].strip().replace(",", "")
        assert last_number(row["rejected"]) != chosen


def test_long_texts_are_read_in_a_moment() -> None:
    start = time.perf_counter()
    for unit in ("1,", "1.", "1 ", "x", "(", "\\boxed{", "#### ", "\\frac{1}", "answer ", "1 1/"):
        for read in (last_number, choice, exact):
            read(unit * 20_000)
    assert time.perf_counter() - start < 5
