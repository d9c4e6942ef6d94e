"""Names of columns by which people publish preference data, and what to do with such a table."""

from collections.abc import Collection
from typing import NamedTuple

# A text in one of these columns is the system message
SYSTEM = ("system", "system_prompt")
# A value in one of these columns says which of two answers is better
WINNER = (
    "winner",
    "winner_model_a",
    "winner_tie",
    "better_response_id",
    "preference_strength",
    "overall_preference",
)
# Columns whose meaning is so well known that a row is not trained on as if they were not there
TELLING = (*SYSTEM, *WINNER)


class Form(NamedTuple):
    """A published form of rows."""

    name: str
    # The columns by which a table of this form is known
    columns: frozenset[str]
    # What to do with such a table
    advice: str


def _preset(name: str, also: str = "") -> str:
    return f"dataset={name}{also} reads it, of the hub dataset=hub dataset/columns={name}{also}"


FORMS = (
    Form("ShareGPT", frozenset({"conversations", "chosen", "rejected"}), _preset("sharegpt")),
    Form("alpaca", frozenset({"instruction", "chosen", "rejected"}), _preset("alpaca")),
    Form("raw UltraFeedback", frozenset({"instruction", "completions"}), _preset("scored")),
    Form("ranked answers", frozenset({"prompt", "answers"}), _preset("ranked")),
    Form(
        "Chatbot Arena", frozenset({"conversation_a", "conversation_b", "winner"}), _preset("arena")
    ),
    Form(
        "HelpSteer3",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        _preset("helpsteer"),
    ),
    Form(
        "HelpSteer2",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        _preset(
            "helpsteer",
            " dataset.columns.prompt=prompt dataset.columns.first=response_1 "
            "dataset.columns.second=response_2 dataset.columns.winner=preference_strength",
        ),
    ),
    Form("OpenAssistant's trees", frozenset({"message_tree_id"}), "dataset=oasst reads them"),
    Form(
        "single completions with a label",
        frozenset({"completion", "label"}),
        "these are training rows of dataset=unpaired or unpaired_hub; held-out rows are pairs",
    ),
    Form(
        "alpaca",
        frozenset({"instruction", "output"}),
        "if output is a list of two answers, the better first, "
        + _preset("alpaca", " dataset.columns.chosen=output dataset.columns.rejected=output")
        + "; one answer makes no pair",
    ),
    Form("ShareGPT", frozenset({"conversations"}), "one answer to a conversation makes no pair"),
)


def recognise(present: Collection[str], read: Collection[str]) -> str:
    """Return a sentence that says what a table looks like; empty: it looks like nothing known.

    Args:
        present: the columns of the table.
        read: the columns that are read already; a form with no other column is not named.
    """
    for form in FORMS:
        if form.columns <= set(present) and not form.columns <= set(read):
            return f". This looks like {form.name}: {form.advice} (docs/data.md)"
    return ""
