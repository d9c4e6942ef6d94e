"""Write the pairs: `python -m orpo_lab curate pairs FOLDER [--min-votes N] [--majority X] ...`.

A rule (orpo_lab/curate/rules.py) makes pairs of the votes. They go to `pairs.jsonl`, which
`dataset=file` reads as it is, and what they are goes to `card.md`. Both files are replaced whole.

A row holds `prompt`, `chosen` and `rejected` as messages, and `provenance`, which training names
once as a column that is not read. Provenance says who made the answers and how many annotators
chose, and nothing of who the annotators are.
"""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from orpo_lab import program
from orpo_lab.curate import card
from orpo_lab.curate.agreement import read_votes
from orpo_lab.curate.folder import CARD, PAIRS, Candidate, Prompt, read_candidates, read_prompts
from orpo_lab.curate.rules import (
    BOTH_BAD_WEIGHTS,
    DROPPED,
    TIE_WEIGHTS,
    Decision,
    Opinions,
    Rule,
    Winner,
    decide,
    opinions,
    outcomes,
)
from orpo_lab.curate.store import Comparison, Vote, check_all_there
from orpo_lab.data.pairs import Message
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact


@dataclass(frozen=True)
class Curation:
    """All that a folder holds."""

    name: str
    prompts: Sequence[Prompt]
    candidates: Sequence[Candidate]
    comparisons: Sequence[Comparison]
    votes: Sequence[Vote]


@dataclass(frozen=True)
class Pairs:
    """The rows of `pairs.jsonl`, and how many comparisons became no row, by reason."""

    rows: list[dict[str, Any]]
    dropped: Counter[str]


def read(folder: Path) -> Curation:
    """Return what a folder holds.

    Raises:
        UserError: there are no prompts, no candidates or no votes yet.
    """
    comparisons, votes = read_votes(folder)
    prompts, candidates = read_prompts(folder), read_candidates(folder)
    return Curation(folder.resolve().name, prompts, candidates, comparisons, votes)


def make(curation: Curation, rule: Rule) -> Pairs:
    """Return the pairs that a rule makes of the votes, in the order of the comparisons.

    Raises:
        UserError: a comparison names a prompt or a candidate that is not there.
    """
    check_all_there(curation.comparisons, curation.prompts, curation.candidates)
    by_prompt = {prompt.id: prompt for prompt in curation.prompts}
    by_candidate = {candidate.id: candidate for candidate in curation.candidates}
    said = opinions(curation.votes, rule.kinds)
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for comparison in curation.comparisons:
        choices = said.get(comparison.id, {})
        decision = decide(choices.values(), rule)
        prompt = by_prompt[comparison.prompt_id]
        first, second = by_candidate[comparison.first], by_candidate[comparison.second]
        chosen, rejected = (first, second) if decision.winner == "first" else (second, first)
        texts = {first.text.strip(), second.text.strip()}
        if decision.winner is None:
            dropped[decision.reason] += 1
        elif len(texts) == 1 or "" in texts:
            dropped["same_text"] += 1
        else:
            rows.append(_row(comparison, prompt, chosen, rejected, choices, decision))
    return Pairs(rows, dropped)


def _row(
    comparison: Comparison,
    prompt: Prompt,
    chosen: Candidate,
    rejected: Candidate,
    choices: Opinions,
    decision: Decision,
) -> dict[str, Any]:
    num = Counter(choices.values())
    loser: Winner = "second" if decision.winner == "first" else "first"
    return {
        "prompt": prompt.messages,
        "chosen": _answer(chosen),
        "rejected": _answer(rejected),
        "provenance": {
            "comparison": comparison.id,
            "prompt_id": prompt.id,
            "source": prompt.source,
            "row": prompt.row,
            "licence": prompt.licence,
            "chosen_id": chosen.id,
            "rejected_id": rejected.id,
            "chosen_made_by": published(chosen.made_by),
            "rejected_made_by": published(rejected.made_by),
            "num_annotators": len(choices),
            "votes": {
                "chosen": decision.num_for,
                "rejected": num[loser],
                "tie": num["tie"],
                "both_bad": num["both_bad"],
            },
            "agreement": round(decision.num_for / decision.num_counted, 4),
        },
    }


def _answer(candidate: Candidate) -> list[Message]:
    return [{"role": "assistant", "content": candidate.text}]


def published(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an answer without secrets, and without folders of this machine."""
    model = str(made_by.get("model", ""))
    is_folder = Path(model).is_absolute() or Path(model).is_dir()
    shown = {"model": Path(model).name} if is_folder else {}
    return redact({**made_by, **shown})


def _refuse_none(made: Pairs, votes: Sequence[Vote]) -> None:
    """Refuse to write no pair, and name a rule that would keep some.

    Raises:
        UserError: there is no pair.
    """
    if made.rows:
        return
    kept = [outcome for outcome in outcomes(votes) if outcome.num_kept]
    hint = "; no rule would keep any: take more votes"
    if kept:
        most = max(kept, key=lambda outcome: outcome.num_kept)
        hint = f"; {_options(most.rule)} alone would keep {most.num_kept}"
    why = ", ".join(f"{num} {reason}" for reason, num in made.dropped.most_common())
    raise UserError(f"the votes make no pair ({why}){hint}")


def _options(rule: Rule) -> str:
    """Return the options that make a rule."""
    default = vars(Rule())
    changed = {name: value for name, value in vars(rule).items() if value != default[name]}
    said = [
        f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
        for name, value in changed.items()
    ]
    return " ".join(said) or "the default rule"


def launch_command(file: Path) -> str:
    """Return the command that trains on the pairs."""
    overrides = ["model=smollm2_135m", "dataset=file", f"dataset.train_path={file}"]
    return f"{program.command('train')} {shlex.join(overrides)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    default = Rule()
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    parser.add_argument(
        "--min-votes",
        type=int,
        default=default.min_votes,
        metavar="N",
        help=f"least votes on a comparison (default: {default.min_votes})",
    )
    parser.add_argument(
        "--majority",
        type=float,
        default=default.majority,
        metavar="X",
        help=f"least share of them for the chosen answer, 0 to 1 (default: {default.majority:g})",
    )
    parser.add_argument(
        "--margin",
        type=int,
        default=default.margin,
        metavar="N",
        help="least votes by which the chosen answer leads the other one "
        f"(default: {default.margin})",
    )
    parser.add_argument(
        "--tie",
        choices=TIE_WEIGHTS,
        default=default.tie,
        help=f"a tie counts against the chosen answer, or not at all (default: {default.tie})",
    )
    parser.add_argument(
        "--both-bad",
        choices=BOTH_BAD_WEIGHTS,
        default=default.both_bad,
        help="the same of 'both bad'; veto: one such vote drops the comparison "
        f"(default: {default.both_bad})",
    )
    parser.add_argument("--judges", action="store_true", help="count the votes of LLM judges, too")
    parser.add_argument(
        "--language",
        metavar="CODE",
        help="of the prompts, such as en, for the card",
    )


def run(options: argparse.Namespace) -> None:
    """Write the pairs and their card, and print how to train on them.

    Raises:
        UserError: there are no votes, the rule keeps nothing, or an argument is out of range.
        OSError: the folder cannot be written to.
    """
    rule = Rule(**{field.name: getattr(options, field.name) for field in fields(Rule)})
    curation = read(options.folder)
    made = make(curation, rule)
    _refuse_none(made, curation.votes)
    file = options.folder / PAIRS
    command = launch_command(file)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
    place = RunFolder(options.folder)
    place.write(PAIRS, "".join(lines))
    place.write(CARD, card.text(curation, made, rule, options.language))
    print(f"{len(made.rows)} pairs of {len(curation.comparisons)} comparisons")
    for reason, words in DROPPED.items():
        if made.dropped[reason]:
            print(f"  {made.dropped[reason]} are left out: {words}")
    print(f"pairs  {file}\ncard   {options.folder / CARD}\ntrain  {command}")
