"""Have an LLM vote as one more annotator: `python -m orpo_lab curate judge FOLDER --model MODEL`.

The judge is asked about every comparison twice, with the answers in both orders (round 0 and 1);
see `question`. Two replies in a row that name neither an answer nor a tie count as a skip.

The step goes on where it was interrupted. At its end it says how far the judge prefers the first
place and the longer answer, beside the people.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist, mean

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from orpo_lab.curate import ask, question
from orpo_lab.curate.ask import Answer, Answerer, Request
from orpo_lab.curate.folder import Candidate, Prompt, held, read_candidates, read_prompts
from orpo_lab.curate.models import check_options, open_model
from orpo_lab.curate.question import VERSION, Place, Side
from orpo_lab.curate.store import Choice, Comparison, Store, Vote, check_all_there
from orpo_lab.data.pairs import in_words
from orpo_lab.errors import UserError

# How many characters of a reply that says nothing are kept as a note
_NOTE = 200
CONFIDENCE = 0.95

SIDES = {"first", "second"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    ask.add_arguments(parser)
    parser.add_argument(
        "--num", type=int, metavar="N", help="judge the first N comparisons (default: all)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=16,
        metavar="N",
        help="the largest number of tokens of a reply; more for a model that reasons (default: 16)",
    )


def run(options: argparse.Namespace) -> None:
    """Add the votes of a judge to the folder, and print what it prefers.

    Raises:
        UserError: there are no comparisons, an argument is out of range, or no request can be
            answered.
        OSError: the folder cannot be written to.
    """
    _check(options)
    prompts = {prompt.id: prompt for prompt in read_prompts(options.folder)}
    candidates = {candidate.id: candidate for candidate in read_candidates(options.folder)}
    with held(options.folder):
        store = Store(options.folder)
        check_all_there(store.comparisons(), prompts.values(), candidates.values())
        questions = [
            Question(
                one, round, prompts[one.prompt_id], candidates[one.first], candidates[one.second]
            )
            for one in store.comparisons()[: options.num]
            for round in (0, 1)
        ]
        if not questions:
            raise UserError(f"{options.folder} has no comparisons; `curate candidates` makes them")
        judge = open_model(options.model[0], options)
        vote(judge, questions, store, options.max_new_tokens)
        votes = store.votes()
    name = annotator_of(judge)
    num = Counter(vote.choice for vote in votes if vote.annotator == name)
    print(f"{name}: {num.total()} votes, {num['tie']} ties, {num['skip']} without a choice")
    print(bias_of(name, votes, store.comparisons(), [*candidates.values()]))


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that are out of range."""
    check_options(options)
    if len(options.model) > 1:
        raise UserError("--model is given more than once; call the step once for each judge")
    if options.num is not None and options.num < 1:
        raise UserError(f"--num {options.num} must be at least 1")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")


def annotator_of(judge: Answerer) -> str:
    """Return the name under which a judge votes; a local model is named by folder and weights."""
    weights = judge.found.get("weights")
    name = f"{Path(judge.name).name} {weights[:8]}" if weights else judge.name
    return f"{name} (prompt {VERSION})"


@dataclass(frozen=True)
class Question:
    """A comparison as a judge is asked about it in one of the two rounds."""

    comparison: Comparison
    round: int
    prompt: Prompt
    first: Candidate
    second: Candidate

    @property
    def left(self) -> Side:
        """The answer that is shown first: in round 0 by chance, in round 1 the other one."""
        is_swapped = (xxh3_64_intdigest(self.comparison.id.encode()) + self.round) % 2
        return "second" if is_swapped else "first"

    def request(self, judge: str, max_new_tokens: int) -> Request:
        """Return what is asked of the judge with this name; its id is that of the vote."""
        key = xxh3_64_hexdigest(f"{judge} {self.comparison.id} {self.round}".encode())
        first, second = self.first.text, self.second.text
        if self.left == "second":
            first, second = second, first
        prompt = in_words(self.prompt.messages)
        return question.request(key, prompt, first, second, max_new_tokens)

    def choice_of(self, place: Place) -> Choice:
        """Return what a judge that names a place chooses."""
        other: Side = "second" if self.left == "first" else "first"
        choices: dict[Place, Choice] = {"first": self.left, "second": other, "tie": "tie"}
        return choices[place]


def vote(judge: Answerer, questions: Sequence[Question], store: Store, max_new_tokens: int) -> None:
    """Ask a judge the questions that it has not answered yet, and add its votes to the store.

    Raises:
        UserError: no request can be answered.
    """
    name = annotator_of(judge)
    requests = [one.request(name, max_new_tokens) for one in questions]
    by_id = {one.id: asked for one, asked in zip(requests, questions, strict=True)}
    have = {vote.id for vote in store.votes()} & by_id.keys()

    def keep(id: str, place: Place | None, reply: Answer, counts: bool) -> None:
        if counts:
            choice = place and by_id[id].choice_of(place)
            store.add_vote(_vote_of(by_id[id], id, name, choice, reply))

    tally = question.ask(judge, requests, have, keep)
    print(f"{judge.name}: {tally.num_kept} votes", end="")
    print(f", {len(have)} were there already" if have else "")
    if tally.num_unclear:
        print(f"{judge.name}: {tally.num_unclear} first replies were neither A, B nor tie")
    for reason, num in tally.failed.most_common(3):
        print(f"{judge.name}: {num} votes failed; the same command tries again: {reason}")


def _vote_of(question: Question, id: str, name: str, choice: Choice | None, reply: Answer) -> Vote:
    return Vote(
        id=id,
        comparison=question.comparison.id,
        annotator=name,
        kind="judge",
        choice=choice or "skip",
        left=question.left,
        round=question.round,
        note="" if choice else f"unclear reply: {reply.text[:_NOTE]}",
        seconds=0.0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Share:
    """A share over comparisons, and its interval of 95 %."""

    value: float
    low: float
    high: float
    num: int
    """Number of comparisons."""

    def __str__(self) -> str:
        """Return the share as text, such as 62 % [48, 74] of 50."""
        value, low, high = (f"{100 * x:.0f}" for x in (self.value, self.low, self.high))
        return f"{value} % [{low}, {high}] of {self.num}"


def share_of(values: Sequence[float]) -> Share | None:
    """Return the mean of values in [0, 1], and Wilson's interval; None: there are no values.

    The interval is for shares of comparisons that each count 0 or 1 (Wilson 1927). Where several
    votes make a value between these, the values vary less, and the interval is on the safe side.
    """
    if not values:
        return None
    num, share = len(values), mean(values)
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    reach = (z2 * share * (1 - share) / num + (z2 / (2 * num)) ** 2) ** 0.5 / (1 + z2 / num)
    return Share(share, max(0.0, centre - reach), min(1.0, centre + reach), num)


def first_place(votes: Iterable[Vote]) -> Share | None:
    """Return how often votes prefer the answer that was shown first; without bias one half.

    Only votes for one of the two answers count. All of a comparison's votes make one value, since
    they are about the same two texts. Give a judge's votes `in_both_orders`.
    """
    return share_of(_means((vote.comparison, vote.choice == vote.left) for vote in _decided(votes)))


def longer_answer(
    votes: Iterable[Vote], comparisons: Iterable[Comparison], candidates: Iterable[Candidate]
) -> Share | None:
    """Return how often votes prefer the answer with more characters.

    Only votes for one of the two answers count, and only where the lengths differ. All of a
    comparison's votes make one value.
    """
    lengths = {candidate.id: len(candidate.text) for candidate in candidates}
    longer: dict[str, Side] = {
        one.id: "first" if lengths[one.first] > lengths[one.second] else "second"
        for one in comparisons
        if lengths[one.first] != lengths[one.second]
    }
    return share_of(
        _means(
            (vote.comparison, vote.choice == longer[vote.comparison])
            for vote in _decided(votes)
            if vote.comparison in longer
        )
    )


def in_both_orders(votes: Iterable[Vote]) -> list[Vote]:
    """Return a judge's votes for one of two answers, if both rounds have such a vote."""
    by_comparison: dict[str, list[Vote]] = defaultdict(list)
    for vote in _decided(votes):
        by_comparison[vote.comparison].append(vote)
    both = (group for group in by_comparison.values() if {one.left for one in group} == SIDES)
    return [vote for group in both for vote in group]


def _decided(votes: Iterable[Vote]) -> list[Vote]:
    return [vote for vote in votes if vote.choice in SIDES]


def _means(values: Iterable[tuple[str, bool]]) -> list[float]:
    """Return the mean of the values of each comparison."""
    by_comparison: dict[str, list[bool]] = defaultdict(list)
    for comparison, value in values:
        by_comparison[comparison].append(value)
    return [mean(map(float, group)) for group in by_comparison.values()]


@dataclass(frozen=True)
class Bias:
    """What a judge prefers, beside the people; None: no comparison tells."""

    consistent: Share | None
    """How often the judge chooses the same answer in both orders."""
    first_place: Share | None
    people_first_place: Share | None
    longer_answer: Share | None
    people_longer_answer: Share | None

    def __str__(self) -> str:
        """Return the shares in words, a line each."""
        rows = [
            ("the same answer in both orders", self.consistent, None),
            ("the answer in the first place", self.first_place, self.people_first_place),
            ("the longer answer", self.longer_answer, self.people_longer_answer),
        ]
        return "\n".join(
            f"  {what}: {own or 'no comparison tells'}{f'; people {people}' if people else ''}"
            for what, own, people in rows
        )


def bias_of(
    judge: str,
    votes: Sequence[Vote],
    comparisons: Sequence[Comparison],
    candidates: Sequence[Candidate],
) -> Bias:
    """Return what a judge prefers, beside the people.

    Args:
        judge: the annotator.
        votes: all votes.
        comparisons: all comparisons.
        candidates: all candidates.
    """
    own = [vote for vote in votes if vote.annotator == judge]
    people = [vote for vote in votes if vote.kind == "person"]
    both = in_both_orders(own)
    choices: dict[str, set[Choice]] = defaultdict(set)
    for vote in both:
        choices[vote.comparison].add(vote.choice)
    return Bias(
        consistent=share_of([float(len(chosen) == 1) for chosen in choices.values()]),
        first_place=first_place(both),
        people_first_place=first_place(people),
        longer_answer=longer_answer(own, comparisons, candidates),
        people_longer_answer=longer_answer(people, comparisons, candidates),
    )
