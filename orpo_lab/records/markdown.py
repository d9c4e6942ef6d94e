"""Texts of models and users inside Markdown."""

import re


def fenced(text: str) -> str:
    """Return a text as a block of code, with a fence that is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"
