"""What to ship: which setting, which of its run folders, and what would change the answer.

Nothing is said here that the verdict does not support. Where the verdict names no winner, one of
the settings that are not separated is proposed, and the reason says by what.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orpo_lab import program
from orpo_lab.compare.evidence import Comparison, Setting
from orpo_lab.compare.read import Run
from orpo_lab.compare.untrained import Gain, gains, listed, name_before
from orpo_lab.compare.verdict import Quality
from orpo_lab.compare.words import against_guess, amount_text, gap_text, needed_text
from orpo_lab.redaction import HIDDEN

# A quality is at the edge of its margin if it is at most this share of the margin away from it
EDGE = 0.5
# How many settings have their answers side by side, and for how many prompts
MAX_SETTINGS, MAX_PROMPTS = 3, 4
# Keys of a start that a repetition does not need
OF_A_START = ("resume", "accept_changes")


@dataclass(frozen=True)
class Ship:
    """The setting to ship, and all that follows from this choice."""

    comparison: Comparison
    number: int
    """The number of the setting."""

    @property
    def setting(self) -> Setting:
        """The setting to ship."""
        return self.comparison.settings[self.number]

    @property
    def is_winner(self) -> bool:
        """Whether the setting is the winner; else it is one of those that are not separated."""
        return self.number == self.comparison.verdict.winner

    @cached_property
    def rivals(self) -> list[int]:
        """The other settings that the evidence does not separate from the leader."""
        return [number for number in _open(self.comparison) if number != self.number]

    @cached_property
    def by_accuracy(self) -> list[Run]:
        """The runs of the setting, from the lowest to the highest preference accuracy."""
        accuracies = self.comparison.accuracy.scores[self.number].mean(1)
        quality = self.comparison.qualities[0].measure.scores[self.number].mean(1)
        order = sorted(range(len(accuracies)), key=lambda i: (accuracies[i], quality[i]))
        return [self.setting.runs[i] for i in order]

    @property
    def best(self) -> Run:
        """The run with the highest preference accuracy among its seeds; chance flatters it."""
        return self.by_accuracy[-1]

    @property
    def typical(self) -> Run:
        """The run of the median seed; of an even number of runs the lower one of the two."""
        return self.by_accuracy[(len(self.by_accuracy) - 1) // 2]

    @cached_property
    def gains(self) -> list[Gain]:
        """How far the setting is above the untrained model; empty: this was not measured."""
        return gains(self.comparison, self.number)

    @property
    def export(self) -> str | None:
        """The command that exports the best run as a whole model; None: it has no model.

        A merged model needs no base, so the command is the same wherever the base came from.
        """
        folder = self.best.folder
        if not (folder / "final").is_dir():
            return None
        arguments = shlex.join([str(folder), "--merge", "--to", "shipped_model"])
        return f"{program.command('export')} {arguments}"

    @property
    def repeat(self) -> str:
        """The command that repeats the best run in a new folder."""
        return repeating(self.best.overrides)

    @property
    def has_hidden(self) -> bool:
        """Whether a secret in the command is masked."""
        return HIDDEN in self.repeat

    def samples(self) -> list[dict[str, Any]]:
        """Return answers to the same held-out prompts, of the untrained model and of settings.

        The settings are the one to ship and those next to it that are not separated from it, or
        the nearest beaten one. Each answers by its typical run. A sample has a `prompt`, the
        `chosen` completion, and `answers`: the name of a model in `of`, its `answer`, and what it
        `is` if answers were checked.
        """
        verdict = self.comparison.verdict
        others = self.rivals or [n for n in (verdict.nearest,) if n not in (None, self.number)]
        others = sorted(others, key=lambda n: -verdict.accuracies[n].estimate)
        shown = [self, *(Ship(self.comparison, n) for n in others[: MAX_SETTINGS - 1])]
        prompts = [sample["prompt"] for sample in self.typical.samples]
        same = [
            each
            for each in shown
            if [sample["prompt"] for sample in each.typical.samples] == prompts
        ]
        found = []
        for place, sample in enumerate(self.typical.samples[:MAX_PROMPTS]):
            answers = [_answer(name_before(self.typical), sample, "before")]
            answers += [
                _answer(each.setting.name, each.typical.samples[place], "after") for each in same
            ]
            prompt, chosen = sample["prompt"], sample["chosen"]
            found.append({"prompt": prompt, "chosen": chosen, "answers": answers})
        return found

    def reason(self) -> str:
        """Return why this setting is proposed, as a sentence without its subject."""
        verdict = self.comparison.verdict
        quality = self.comparison.qualities[0].name
        if self.is_winner and verdict.nearest is None:
            return "is the only setting of good quality"
        if self.is_winner:
            return "is shown to be above every other setting of good quality"
        if len(self.comparison.settings) == 1:
            return "is the only setting"
        accuracy, first = self._figures(self.number)
        doubtful = verdict.qualities[self.number].doubtful_in
        # The settings that it was chosen from: see `choose`
        others = [n for n in self.rivals if doubtful or not verdict.qualities[n].doubtful_in]
        tied = [number for number in others if self._figures(number)[0] == accuracy]
        alike = [number for number in tied if self._figures(number)[1] == first]
        among = " of them" if others else ""
        if len(others) < len(self.rivals):
            among = " of those whose quality is not in doubt"
        text = f"has the highest preference accuracy{among}"
        if alike:
            text = f"ties with {self._names(alike)} for the highest preference accuracy{among}, "
            text += f"and in {quality}: any of these will do"
        elif tied:
            text = f"ties with {self._names(tied)} for the highest preference accuracy{among}, "
            text += f"and is the best of these in {quality}"
        return text + (f", but its {' and '.join(doubtful)} is in doubt" if doubtful else "")

    def _figures(self, number: int) -> tuple[float, float]:
        """Return a setting's preference accuracy and first quality."""
        verdict = self.comparison.verdict
        first = verdict.qualities[number].intervals[0]
        return verdict.accuracies[number].estimate, first.estimate

    def _names(self, numbers: list[int]) -> str:
        return listed([self.comparison.settings[number].name for number in numbers])

    def headline(self) -> str:
        """Return in a sentence or two which setting to ship, and why."""
        name, reason = self.setting.name, self.reason()
        if len(self.comparison.settings) == 1:
            return "There is one setting, so there is nothing to choose from."
        if self.is_winner:
            return f"Ship {name}, the winner: it {reason}."
        if self.rivals:
            names = self._names([self.number, *self.rivals])
            return f"There is no winner: {names} are not separated. Take {name}: it {reason}."
        return f"There is no winner. Take {name}: it {reason}."

    def against_untrained(self) -> list[str]:
        """Return how the setting compares with the untrained model, as sentences."""
        has_start = self.best.values.get("start_from")
        model = "the model that training began with" if has_start else "the untrained model"
        if not self.gains:
            return [f"How it compares with {model} was not measured."]
        if len(self.setting.runs) == 1:
            return [f"One seed cannot show that it is better than {model}."]
        said = []
        for gain in self.gains:
            by = gap_text(gain.interval, gain.unit, is_share=gain.is_share)
            said.append(f"{gain.name} is {gain.said} (by {by})")
        sentences = [f"Against {model}, {'; '.join(said)}."]
        worse = [gain.name for gain in self.gains if gain.said == "worse"]
        if worse:
            sentences.append(
                f"Think twice before you ship it: training has cost {' and '.join(worse)}."
            )
        if self.gains[0].said == "not separated":
            sentences.append("It is not shown that training has improved preference accuracy.")
        return sentences

    def against_guess(self) -> list[str]:
        """Return how the setting compares with a guess by length alone, as sentences."""
        return against_guess(self.comparison, self.number)

    def brief(self) -> list[str]:
        """Return two lines for a terminal: what to ship, and where it is."""
        num = len(self.setting.runs)
        which = f"the best of {num} seeds, flattered by chance" if num > 1 else "its only seed"
        return [self.headline(), f"ship    {self.best.folder / 'final'} ({which})"]

    def would_change(self) -> list[str]:
        """Return what would change the answer, as sentences."""
        verdict, settings = self.comparison.verdict, self.comparison.settings
        found = []
        if verdict.open_gap and verdict.nearest is not None and verdict.lead is not None:
            leader, nearest = settings[verdict.leader].name, settings[verdict.nearest].name
            by = f"{leader} is above {nearest} by {gap_text(verdict.lead)}. {needed_text(verdict)}"
            tie = f"{leader} and {nearest} tie."
            found.append(f"More seeds or pairs: {by if verdict.lead.estimate else tie}")
        if verdict.one_seed:
            names = self._names(verdict.one_seed)
            found.append(f"A second and third seed of {names}: one seed shows nothing.")
        found += [*self._in_doubt(), *self._at_the_margins()]
        return found or [
            "Nothing at hand: no setting is open, in doubt, or near the edge of a margin."
        ]

    def _in_doubt(self) -> Iterator[str]:
        for quality in self.comparison.qualities:
            standings = self.comparison.verdict.qualities
            names = [
                number
                for number in (self.number, *self.rivals)
                if quality.name in standings[number].doubtful_in
            ]
            if names:
                yield (
                    f"More seeds: the {quality.name} of {self._names(names)} is below the best by "
                    f"more than the margin ({_amount(quality.margin, quality)}), but perhaps by "
                    "chance. What is shown to be worse is out."
                )

    def _at_the_margins(self) -> Iterator[str]:
        verdict = self.comparison.verdict
        accuracy, _ = self._figures(self.number)
        for place, quality in enumerate(self.comparison.qualities):
            margin, gap = quality.margin, self._behind(place, self.number)
            if gap > 0 and (1 - EDGE) * margin <= gap <= margin:
                yield (
                    f"A narrower margin: the {quality.name} of {self.setting.name} is "
                    f"{_amount(gap, quality)} below the best; {_amount(margin, quality)} are "
                    "allowed."
                )
            near = [
                number
                for number, standing in enumerate(verdict.qualities)
                if standing.worse_in == [quality.name]
                and self._figures(number)[0] > accuracy
                and self._behind(place, number) <= (1 + EDGE) * margin
            ]
            if near:
                widest = max(self._behind(place, number) for number in near)
                yield (
                    f"A wider margin: with about {_amount(widest, quality)} of {quality.name} "
                    f"instead of {_amount(margin, quality)}, {self._names(near)} would not be out, "
                    "with a higher preference accuracy."
                )

    def _behind(self, place: int, number: int) -> float:
        """Return how far a setting's quality is below the best setting's."""
        standings = self.comparison.verdict.qualities
        best = max(standing.intervals[place].estimate for standing in standings)
        return best - standings[number].intervals[place].estimate


def _answer(of: str, sample: dict[str, str], when: str) -> dict[str, str]:
    judged = sample.get(f"{when}_is")
    return {"of": of, "answer": sample[when]} | ({"is": judged} if judged else {})


def repeating(overrides: Sequence[str]) -> str:
    """Return the command that repeats a run in a new folder.

    Args:
        overrides: those of the run's last start.
    """
    kept = [
        override
        for override in overrides
        if override.lstrip("+").partition("=")[0] not in OF_A_START
    ]
    return f"{program.command('train')} {shlex.join(kept)}".rstrip()


def choose(comparison: Comparison) -> Ship:
    """Return what to ship: the winner, or one of the settings that are not separated.

    Of these, settings with a quality in doubt come last. Then the highest preference accuracy
    counts, then the first quality, then the order of settings.
    """
    verdict = comparison.verdict
    if verdict.winner is not None:
        return Ship(comparison, verdict.winner)

    def rank(number: int) -> tuple[bool, float, float, int]:
        standing = verdict.qualities[number]
        quality = standing.intervals[0].estimate
        accuracy = verdict.accuracies[number].estimate
        return not standing.doubtful_in, accuracy, quality, -number

    return Ship(comparison, max(_open(comparison), key=rank))


def _open(comparison: Comparison) -> list[int]:
    """Return the leader and the settings of good quality that it is not shown to beat."""
    return [comparison.verdict.leader, *comparison.verdict.unbeaten]


def _amount(value: float, quality: Quality) -> str:
    return amount_text(value, quality.unit, is_share=quality.measure.is_share)
