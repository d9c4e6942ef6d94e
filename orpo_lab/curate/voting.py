"""What an annotator is asked next, and what becomes of the answer; nothing here knows HTTP."""

import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_lab import program
from orpo_lab.curate.assignment import assign, left_of, queue
from orpo_lab.curate.folder import Candidate, Prompt, read_candidates, read_prompts, storable
from orpo_lab.curate.store import (
    Assignment,
    Choice,
    Comparison,
    Store,
    Vote,
    check_all_there,
)
from orpo_lab.errors import UserError

MAX_NOTE = 2000
MAX_SECONDS = 86_400.0
# What the page calls a choice -> the choice, where the answer on the left is `first`
_CHOICES: dict[str, Choice] = {
    "left": "first",
    "right": "second",
    "tie": "tie",
    "both_bad": "both_bad",
    "skip": "skip",
}
_MIRRORED: dict[Choice, Choice] = {"first": "second", "second": "first"}


class VoteError(ValueError):
    """A vote that cannot be taken; the message says why."""


@dataclass(frozen=True)
class Turn:
    """Where an annotator is.

    `asked` is what comes next, None at the end. `done` of `total` are answered. `last` is the id of
    the vote that an undo takes back, if there is one.
    """

    asked: Assignment | None
    done: int
    total: int
    last: str | None


@dataclass(frozen=True)
class Pair:
    """What the page shows of a comparison: texts, and nothing that tells who wrote them."""

    messages: Sequence[Mapping[str, Any]]
    left: str
    right: str


class Voting:
    """The votes of people on the comparisons of a folder.

    Args:
        folder: the folder of a curation, with prompts and candidates.
        annotators: who votes.
        votes_per_pair: how many people are asked about a comparison.
        repeats: for each annotator the share of comparisons that is asked a second time.

    Raises:
        UserError: there are no prompts, candidates or comparisons, a comparison's texts are gone,
            or an annotator has the name of a judge.
    """

    def __init__(
        self, folder: Path, annotators: Sequence[str], votes_per_pair: int, repeats: float
    ) -> None:
        self.annotators = annotators
        self._prompts: dict[str, Prompt] = {one.id: one for one in read_prompts(folder)}
        self._candidates: dict[str, Candidate] = {one.id: one for one in read_candidates(folder)}
        self.store = Store(folder)
        self.comparisons: dict[str, Comparison] = {one.id: one for one in self.store.comparisons()}
        if not self.comparisons:
            raise UserError(
                f"{folder} has no prompt with two different answers; "
                f"`{program.command('curate candidates')}` makes answers"
            )
        check_all_there(
            self.comparisons.values(), self._prompts.values(), self._candidates.values()
        )
        judges = {vote.annotator for vote in self.store.votes() if vote.kind == "judge"}
        if taken := judges.intersection(annotators):
            raise UserError(
                f"--annotators: {min(taken)!r} is a judge; give the person another name"
            )
        before = self.store.assignments()
        self.store.assign(
            assign(
                list(self.comparisons), annotators, self.votes(), before, votes_per_pair, repeats
            )
        )

    def votes(self) -> list[Vote]:
        """Return the votes of people that stand."""
        return [vote for vote in self.store.votes() if vote.kind == "person"]

    def turn(self, annotator: str) -> Turn:
        """Return where an annotator is."""
        votes = self.store.votes(annotator)
        cast = {(vote.comparison, vote.round) for vote in votes}
        skipped = {vote.comparison for vote in votes if vote.choice == "skip" and vote.round == 0}
        # Who skipped a comparison once is not asked again
        asked = [
            one
            for one in queue(self.store.assignments(annotator))
            if (one.comparison, one.round) in cast or not (one.round and one.comparison in skipped)
        ]
        open_ = [one for one in asked if (one.comparison, one.round) not in cast]
        return Turn(
            asked=open_[0] if open_ else None,
            done=len(asked) - len(open_),
            total=len(asked),
            last=votes[-1].id if votes else None,
        )

    def show(self, asked: Assignment) -> Pair:
        """Return the texts of a comparison, the answers where this annotator sees them."""
        comparison = self.comparisons[asked.comparison]
        texts = [self._candidates[name].text for name in (comparison.first, comparison.second)]
        if left_of(asked.annotator, asked.comparison, asked.round) == "second":
            texts.reverse()
        return Pair(self._prompts[comparison.prompt_id].messages, *texts)

    def take(self, annotator: str, sent: Mapping[str, Any]) -> bool:
        """Keep a vote that a page has sent; return whether this vote counts.

        A vote may come twice: it counts once, and the answer is the same. A second vote for the
        same comparison and round, from another tab, does not count. A vote on a comparison that has
        gone to somebody else in the meantime counts: it was asked for when the page showed it.

        Raises:
            VoteError: a value is missing or out of range.
        """
        vote = self._read(annotator, sent)
        new = self.store.add_vote(vote)
        return new or any(other.id == vote.id for other in self.store.votes(annotator))

    def undo(self, annotator: str, vote: Any) -> None:
        """Take back a vote of an annotator; a vote that does not stand stays as it is."""
        self.store.withdraw(storable(str(vote)), annotator, _now())

    def _read(self, annotator: str, sent: Mapping[str, Any]) -> Vote:
        try:
            name, comparison, round_ = str(uuid.UUID(sent["id"])), sent["comparison"], sent["round"]
            choice, note, seconds = _CHOICES[sent["choice"]], sent["note"], float(sent["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise VoteError(f"the vote is incomplete ({type(error).__name__})") from error
        if not isinstance(comparison, str) or comparison not in self.comparisons:
            raise VoteError("the comparison is not in this folder")
        if round_ not in (0, 1) or not isinstance(note, str) or len(note) > MAX_NOTE:
            raise VoteError("the round or the note is out of range")
        if not math.isfinite(seconds):
            raise VoteError("the time is no number")
        left = left_of(annotator, comparison, round_)
        return Vote(
            id=name,
            comparison=comparison,
            annotator=annotator,
            kind="person",
            choice=choice if left == "first" else _MIRRORED.get(choice, choice),
            left=left,
            round=round_,
            note=storable(note).strip(),
            seconds=min(max(seconds, 0.0), MAX_SECONDS),
            created=_now(),
        )

    def progress(self) -> dict[str, Any]:
        """Return what the owner sees: how far everybody is, and how often each choice was made."""
        votes = self.votes()
        cast = Counter((vote.comparison, vote.annotator, vote.round) for vote in votes)
        open_ = {
            one.comparison
            for one in self.store.assignments()
            if one.round == 0 and not cast[one.comparison, one.annotator, 0]
        }
        return {
            "num_comparisons": len(self.comparisons),
            "num_complete": len(self.comparisons) - len(open_),
            "num_votes": len(votes),
            "turns": {name: self.turn(name) for name in self.annotators},
            "choices": Counter(vote.choice for vote in votes),
            "notes": [vote for vote in votes if vote.note],
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
