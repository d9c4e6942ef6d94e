"""Comparisons, who is asked about them, and votes, in one SQLite file.

A vote is written in one transaction under an id that its maker has chosen, so a vote that is sent
twice counts once. SQLite sends each transaction to the disk before it answers. A vote is never
deleted: a vote that its annotator takes back stays in the table, with the time of that, and stands
no longer. At most one vote stands for a comparison, annotator and round: an index sees to that.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from orpo_lab.curate.folder import CANDIDATES, PROMPTS, VOTES, Candidate, Prompt
from orpo_lab.errors import UserError, one_line

Choice = Literal["first", "second", "tie", "both_bad", "skip"]
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


@dataclass(frozen=True, order=True)
class Assignment:
    """An annotator is asked about a comparison, in a round (see `Vote`)."""

    annotator: str
    comparison: str
    round: int


def check_all_there(
    comparisons: Iterable[Comparison], prompts: Iterable[Prompt], candidates: Iterable[Candidate]
) -> None:
    """Refuse comparisons whose texts are gone.

    Raises:
        UserError: a comparison names a prompt or a candidate that is not there.
    """
    there = {prompt.id for prompt in prompts} | {candidate.id for candidate in candidates}
    for one in comparisons:
        for name in (one.prompt_id, one.first, one.second):
            if name not in there:
                raise UserError(
                    f"comparison {one.id} names {name}, which the folder does not hold; put back "
                    f"{PROMPTS} and {CANDIDATES} as they were, or begin with a new folder"
                )


_VOTE = ", ".join(field.name for field in fields(Vote))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS comparisons (
    id TEXT PRIMARY KEY, prompt_id TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS assignments (
    annotator TEXT NOT NULL, comparison TEXT NOT NULL REFERENCES comparisons(id),
    round INTEGER NOT NULL, PRIMARY KEY (annotator, comparison, round));
CREATE TABLE IF NOT EXISTS votes (
    id TEXT PRIMARY KEY, comparison TEXT NOT NULL REFERENCES comparisons(id),
    annotator TEXT NOT NULL, kind TEXT NOT NULL, choice TEXT NOT NULL, left TEXT NOT NULL,
    round INTEGER NOT NULL, note TEXT NOT NULL, seconds REAL NOT NULL, created TEXT NOT NULL,
    withdrawn TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS one_vote_stands
    ON votes (comparison, annotator, round) WHERE withdrawn IS NULL;
"""


class Store:
    """The votes of a curation.

    Args:
        folder: the folder of the curation; `votes.sqlite` is made there where it is missing.

    Raises:
        UserError: `votes.sqlite` cannot be opened, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / VOTES
        try:
            with closing(self._connect()) as connection:
                connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self._path} cannot be opened: {one_line(error)}; if the file is damaged, put "
                "back a copy of it"
            ) from error

    def add_comparisons(self, comparisons: Iterable[Comparison]) -> None:
        """Add comparisons; those that are there already stay as they are."""
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "INSERT INTO comparisons VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                map(astuple, comparisons),
            )

    def comparisons(self) -> list[Comparison]:
        """Return all comparisons, in the order in which they were added."""
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT * FROM comparisons ORDER BY rowid").fetchall()
        return [Comparison(*row) for row in rows]

    def assign(self, assignments: Iterable[Assignment]) -> None:
        """Put assignments in the place of all that are there."""
        with closing(self._connect()) as connection, connection:
            connection.execute("DELETE FROM assignments")
            connection.executemany(
                "INSERT INTO assignments VALUES (?, ?, ?)", map(astuple, assignments)
            )

    def assignments(self, annotator: str | None = None) -> list[Assignment]:
        """Return all assignments, or those of an annotator."""
        rows = self._select("annotator, comparison, round", "assignments", "TRUE", annotator)
        return [Assignment(*row) for row in rows]

    def add_vote(self, vote: Vote) -> bool:
        """Add a vote; return whether it is new.

        A vote with a known id, or a second vote of the annotator for the comparison in the same
        round, changes nothing. Nor does a vote that was taken back and arrives again.
        """
        places = ", ".join("?" * len(fields(Vote)))
        with closing(self._connect()) as connection, connection:
            found = connection.execute(
                f"INSERT INTO votes ({_VOTE}) VALUES ({places}) ON CONFLICT DO NOTHING",
                astuple(vote),
            )
            return found.rowcount == 1

    def withdraw(self, vote: str, annotator: str, when: str) -> bool:
        """Take back an annotator's vote; return whether it stood until now.

        Args:
            vote: the id of the vote.
            annotator: whose vote it has to be.
            when: the time, which stays beside the vote.
        """
        with closing(self._connect()) as connection, connection:
            found = connection.execute(
                "UPDATE votes SET withdrawn = ? WHERE id = ? AND annotator = ?"
                " AND withdrawn IS NULL",
                (when, vote, annotator),
            )
            return found.rowcount == 1

    def votes(self, annotator: str | None = None) -> list[Vote]:
        """Return the votes that stand, in the order in which they were added.

        Args:
            annotator: whose votes; None for all.
        """
        rows = self._select(_VOTE, "votes", "withdrawn IS NULL", annotator)
        return [Vote(*row) for row in rows]

    def _select(self, columns: str, table: str, which: str, annotator: str | None) -> list[tuple]:
        query = f"SELECT {columns} FROM {table} WHERE {which}"
        if annotator is not None:
            query += " AND annotator = :annotator"
        with closing(self._connect()) as connection:
            found = connection.execute(f"{query} ORDER BY rowid", {"annotator": annotator})
            return found.fetchall()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection
