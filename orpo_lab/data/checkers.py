r"""Checkers: functions that read the answer that a text gives.

A greedy answer is right if a checker reads the same from it as from the row's right answer
(`right_answers`). So a checker is one function, from a text to an answer in a canonical form, or to
None where the text gives none.

Nothing here guesses. The last number of "3-5 days", "at 3:30" or "10^5" is not one number, so none
is read.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import regex

# The answer that a text gives, in a canonical form; None: it gives none
Read = Callable[[str], str | None]

# How long a pattern of the user's may search one text, in seconds: some backtrack without end
MAX_SECONDS = 1.0
# A longer numeral is no number that people write
MAX_NUMERAL = 60

# 1/2 and so on, written as one character, as LaTeX, and as LaTeX without braces
_FRACTIONS = {
    char: unicodedata.normalize("NFKC", char).split("\u2044")
    for char in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)))
}
_FRACTION = re.compile(
    rf"\s*(?:([{''.join(_FRACTIONS)}])|\\[dt]?frac\{{(-?\d+)\}}\{{(\d+)\}}|\\[dt]?frac(\d)(\d))"
)
# What stands between groups of three digits, besides a comma: LaTeX, and spaces that are narrow
_BETWEEN_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
# Digits and what joins them without a space: decimals, but also dates, times, ranges and sums
_NUMERAL = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}.])[-\u2212])?
    (?:\\?[$€£¥₹]\s?)?
    (?P<body>
        # Neither the end of a word (H2O) nor an exponent (cm^2) nor the rest of either
        (?:(?<![A-Za-z_\d^])(?<!\^\{)(?<!\d[.,])\d+|(?<![\w.])\.\d+)
        (?:(?:[.,:/x'_\u2019\u00d7*+^\u2212\u2013-]|\*\*|\^\{|[eE][+-]?
            # A mixed number, or thousands with a space, which may also be two numbers
            |[ ](?=\d+/\d+(?![\d/])|\d{3}(?!\d)))\d+)*
    )
    (?P<power>\^|\*\*(?=\w)|[\u00b9\u00b2\u00b3\u2070-\u2079])?
    (?:\s+(?P<scale>hundred|thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE,
)
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PLAIN = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,2})?")
_MIXED = re.compile(r"(?:(\d+)[ ])?([\d.,]+)/([\d.,]+)")
# A line of GSM8K that gives the answer and no word
_MARKED = re.compile(r"^####([^A-Za-z\n]*\d[^A-Za-z\n]*)$", re.MULTILINE)
# In a box: what may stand beside the number, and what makes it more than a number
_UNITS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\^?\{?\\(?:circ|degree)\}?|\\[%$;: ]")
_IS_NAMED = re.compile(r"^\s*[A-Za-z]\w*\s*=")
_MATHEMATICS = re.compile(r"\\|(?<![A-Za-z])[A-Za-z](?![A-Za-z])")

_OF_LETTER = r"(?:\(([A-Ja-j])\)|([A-J])(?![\w'\u2019-]))"
# "A dog" and "I think" are no letters of a choice; "A because ..." is
_WORDS_AFTER = r"(?![ \t]+(?!(?:because|since|as|for|and|due)\b)[a-z])"
_ANSWER_IS = re.compile(
    r"(?i:\b(?:answer|choice)\b)[\s*_]*(?i:is|would\ be|should\ be)?[\s:=*_]*"
    rf"(?i:option|choice)?[\s*_]*{_OF_LETTER}{_WORDS_AFTER}"
)
_LETTER_ALONE = re.compile(r"^[^\w\n]*([A-J])[^\w\n]*$", re.MULTILINE)
_SMALL_LETTER_ALONE = re.compile(r"\W*([a-j])\W*")
_LETTER_NAMED = re.compile(
    r"^[^\w\n]*([A-J])[.):](?!\w)|\(([A-Ja-j])\)|(?i:\boption)\s+([A-J])\b", re.MULTILINE
)


def reader(checker: str, pattern: str | None) -> Read:
    """Return a checker.

    Args:
        checker: `dataset.checker`.
        pattern: `dataset.checker_pattern`.

    Raises:
        ValueError: there is no such checker.
    """
    match checker:
        case "exact":
            return exact
        case "last_number":
            return last_number
        case "choice":
            return choice
        case "regex":
            return partial(by_pattern, regex.compile(pattern))
    raise ValueError(f"no checker: {checker}")


def exact(text: str) -> str | None:
    """Return the whole text, in which all white space counts as one space."""
    return " ".join(text.split()) or None


def last_number(text: str) -> str | None:
    r"""Return the last number of a text, such as "1875", "-1/2" or "5/2" for 2.5.

    The number in the last `\boxed{...}` counts instead, or that of the last line "#### 42".
    Thousands have a comma or a narrow space, decimals a point. Currency, percent sign and unit do
    not count: 50% is 50. "5 million" is 5,000,000.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return _only_number(boxed)
    marked = _MARKED.findall(text)
    numerals = [*_NUMERAL.finditer(_clean(marked[-1] if marked else text))]
    return _value(numerals[-1]) if numerals else None


def by_pattern(pattern: Any, text: str) -> str | None:
    """Return what the group of a pattern holds at the last match where it is not empty.

    A number is returned in canonical form.

    Args:
        pattern: of the package `regex`, with one group.
        text: the text to search.

    Raises:
        TimeoutError: the search takes longer than MAX_SECONDS.
    """
    found = None
    for match in pattern.finditer(text, timeout=MAX_SECONDS):
        found = exact(match[1] or "") or found
    whole = _NUMERAL.fullmatch(_clean(found.rstrip(".%"))) if found else None
    return (_value(whole) if whole else None) or found


def choice(text: str) -> str | None:
    r"""Return the letter, A to J, that a text chooses.

    It is the letter in the last `\boxed{...}`, or behind the last "answer is", or alone on the last
    such line. Otherwise it is the one letter that is written as those of choices are, such as
    "(B)", "B." at the start of a line or "option B". The article "A" is no letter.
    """
    boxed = _boxed(text)
    if boxed is not None:
        text = re.sub(r"\\[a-z]+|[{}]", " ", boxed)
    for pattern in (_ANSWER_IS, _LETTER_ALONE):
        if found := [*pattern.finditer(text)]:
            return _letter(found[-1])
    alone = _SMALL_LETTER_ALONE.fullmatch(text)
    named = {_letter(match) for match in (alone and [alone]) or _LETTER_NAMED.finditer(text)}
    return named.pop() if len(named) == 1 else None


def _letter(match: re.Match[str]) -> str:
    return next(filter(None, match.groups())).upper()


def _boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, to the end of the text if it is not closed."""
    _, box, rest = text.rpartition("\\boxed{")
    if not box:
        return None
    depth = 1
    for at, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if not depth:
            return rest[:at]
    return rest


def _only_number(boxed: str) -> str | None:
    """Return the number that a box holds beside a unit; None: it holds something else."""
    text = _IS_NAMED.sub("", _UNITS.sub(" ", _clean(boxed)))
    numerals = [*_NUMERAL.finditer(text)]
    if len(numerals) != 1 or _MATHEMATICS.search(text):
        return None
    return _value(numerals[0])


def _clean(text: str) -> str:
    """Return a text with all fractions as 1/2, and all thousands with a comma."""
    return _FRACTION.sub(_fraction, _BETWEEN_THOUSANDS.sub(",", text))


def _fraction(match: re.Match[str]) -> str:
    char, *parts = match.groups()
    above, below = _FRACTIONS[char] if char else filter(None, parts)
    # 2½ is a mixed number
    follows_digit = match.start() and match.string[match.start() - 1].isdigit()
    return f"{' ' if follows_digit or match[0][0].isspace() else ''}{above}/{below}"


def _value(numeral: re.Match[str]) -> str | None:
    """Return the value of a numeral; None: it is a date, a power or the like, not one number."""
    body = numeral["body"]
    if numeral["power"] or len(body) > MAX_NUMERAL:
        return None
    mixed = _MIXED.fullmatch(body)
    parts = mixed.groups("0") if mixed else (body, "0", "1")
    match [_plain(part) for part in parts]:
        case [Fraction() as whole, Fraction() as above, Fraction() as below] if below:
            value = (whole + above / below) * _SCALES.get(numeral["scale"], 1)
            return str(-value if numeral["sign"] else value)
    return None


def _plain(body: str) -> Fraction | None:
    return Fraction(body.replace(",", "")) if _PLAIN.fullmatch(body) else None
