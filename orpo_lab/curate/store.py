"""Comparisons, annotators and votes, in one SQLite file.

A vote is written in one transaction under an id that its maker has chosen, so a vote that is sent
twice counts once. SQLite sends each transaction to the disk before it answers.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from orpo_lab.curate.folder import VOTES

Choice = Literal["first", "second", "tie", "both_bad", "skip"]
CHOICES: tuple[Choice, ...] = ("first", "second", "tie", "both_bad", "skip")
Kind = Literal["person", "judge"]


@dataclass(frozen=True)
class Comparison:
    """Two candidates of one prompt; `first` and `second` say nothing about their places."""

    id: str
    prompt_id: str
    first: str
    second: str


@dataclass(frozen=True)
class Vote:
    """What an annotator says of a comparison.

    `round` is 0 when the annotator sees the comparison for the first time, and 1 when the
    comparison is repeated to measure the annotator's agreement with themselves (for a judge: when
    the answers are asked in the other order). `left` names the answer that was shown on the left,
    or first: "first" or "second". `seconds` is the time that the annotator took.
    """

    id: str
    comparison: str
    annotator: str
    kind: Kind
    choice: Choice
    left: Literal["first", "second"]
    round: int
    note: str
    seconds: float
    created: str


_SCHEMA = """
CREATE TABLE IF NOT EXISTS comparisons (
    id TEXT PRIMARY KEY, prompt_id TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
    id TEXT PRIMARY KEY, comparison TEXT NOT NULL REFERENCES comparisons(id),
    annotator TEXT NOT NULL, kind TEXT NOT NULL, choice TEXT NOT NULL, left TEXT NOT NULL,
    round INTEGER NOT NULL, note TEXT NOT NULL, seconds REAL NOT NULL, created TEXT NOT NULL,
    UNIQUE (comparison, annotator, round));
"""


class Store:
    """The votes of a curation.

    Args:
        folder: the folder of the curation; `votes.sqlite` is made there where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / VOTES
        with closing(self._connect()) as connection:
            connection.executescript(_SCHEMA)

    def add_comparisons(self, comparisons: Iterable[Comparison]) -> None:
        """Add comparisons; those that are there already stay as they are."""
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "INSERT OR IGNORE INTO comparisons VALUES (?, ?, ?, ?)", map(astuple, comparisons)
            )

    def comparisons(self) -> list[Comparison]:
        """Return all comparisons, in the order in which they were added."""
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT * FROM comparisons ORDER BY rowid").fetchall()
        return [Comparison(*row) for row in rows]

    def add_vote(self, vote: Vote) -> bool:
        """Add a vote; return whether it is new.

        A vote with a known id, or a second vote of the annotator for the comparison in the same
        round, changes nothing.
        """
        places = ", ".join("?" * len(fields(Vote)))
        with closing(self._connect()) as connection, connection:
            found = connection.execute(
                f"INSERT OR IGNORE INTO votes VALUES ({places})", astuple(vote)
            )
            return found.rowcount == 1

    def votes(self) -> list[Vote]:
        """Return all votes, in the order in which they were added."""
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT * FROM votes ORDER BY rowid").fetchall()
        return [Vote(*row) for row in rows]

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection
