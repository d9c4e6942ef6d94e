"""What to ship: which setting and run, what the untrained model says to it, and the commands."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_lab import config
from orpo_lab.compare.evidence import Comparison, compare
from orpo_lab.compare.guess import gain, guesses
from orpo_lab.compare.read import Run
from orpo_lab.compare.ship import choose
from orpo_lab.compare.untrained import gains, listed, untrained
from orpo_lab.config.command_line import as_typed
from orpo_lab.config.identity import identity
from orpo_lab.metrics import MARGINS
from orpo_lab.redaction import redact

NUM = 200
SAMPLE = {"prompt": "p", "chosen": "c", "before": "old", "after": "new"}


def scores(accuracy: float, exact_match: float | None, nll: float, rng: Any) -> dict[str, Any]:
    """Return columns of `scores.parquet` with such figures."""
    right = rng.permutation(NUM) < round(accuracy * NUM)
    chosen = rng.normal(-nll, 0.05, NUM)
    none = np.full(NUM, np.nan)
    given = none if exact_match is None else np.full(NUM, 5.0)
    found = {"chosen_logp": chosen, "rejected_logp": chosen - np.where(right, 0.1, -0.1)}
    found |= {"chosen_tokens": np.full(NUM, 3.0), "generated_tokens": given, "repetition": none}
    correct = none if exact_match is None else rng.permutation(NUM) < round(exact_match * NUM)
    return found | {"correct": np.array(correct, dtype=float)}


def run(
    beta: float,
    seed: int,
    accuracy: float = 0.8,
    exact_match: float | None = 0.9,
    nll: float = 1.0,
    before: tuple[float, float | None, float] = (0.5, 0.5, 2.0),
    **rest: Any,
) -> Run:
    """Return a finished run; its figures before training are preference, exact match and NLL."""
    summary = {"after": {}, "before": {}, "dataset_fingerprint": {"train": "", "held_out": ""}}
    made = Run(
        folder=Path(f"sweep/{beta:g}-{seed}"),
        values={"beta": beta, "beta_schedule": "constant", "seed": seed},
        contents={},
        choices={},
        overrides=[f"beta={beta}", f"seed={seed}"],
        state="finished",
        reason="",
        summary=summary,
        metrics=[],
        scores=scores(accuracy, exact_match, nll, np.random.default_rng(seed)),
        scores_before=scores(*before, np.random.default_rng(99)),
        samples=[SAMPLE],
    )
    return replace(made, **rest)


def compared(settings: Mapping[float, Sequence[float]], **rest: Any) -> Comparison:
    """Compare betas by the preference accuracies of their seeds."""
    runs = [
        run(beta, seed, accuracy, **rest)
        for beta, accuracies in settings.items()
        for seed, accuracy in enumerate(accuracies, start=1)
    ]
    return compare(runs, MARGINS)


def test_the_winner_is_shipped_and_its_best_and_its_median_run_are_named() -> None:
    ship = choose(compared({0.1: [0.6, 0.61, 0.62], 0.2: [0.92, 0.9, 0.91]}))
    assert ship.is_winner
    assert ship.headline().startswith("Ship beta=0.2, the winner: it is shown to be above")
    assert (ship.best.folder.name, ship.typical.folder.name) == ("0.2-1", "0.2-3")
    assert ship.brief()[1] == "ship    sweep/0.2-1/final (the best of 3 seeds, flattered by chance)"


def test_a_winner_without_a_rival_is_not_said_to_be_above_one() -> None:
    runs = [run(0.1, s, 0.80 + s / 100, 0.9) for s in (1, 2, 3)]
    runs += [run(0.2, s, 0.95 - s / 100, 0.2) for s in (1, 2, 3)]
    ship = choose(compare(runs, MARGINS))
    assert ship.headline() == "Ship beta=0.1, the winner: it is the only setting of good quality."


def test_of_an_even_number_of_runs_the_lower_one_of_the_two_in_the_middle_is_typical() -> None:
    ship = choose(compared({0.2: [0.92, 0.9, 0.94, 0.96]}))
    assert (ship.best.folder.name, ship.typical.folder.name) == ("0.2-4", "0.2-1")


def test_without_a_winner_it_says_so_and_proposes_the_highest() -> None:
    ship = choose(compared({0.1: [0.85, 0.9, 0.86], 0.2: [0.84, 0.86, 0.9]}))
    assert not ship.is_winner
    assert ship.headline() == (
        "There is no winner: beta=0.1 and beta=0.2 are not separated. "
        "Take beta=0.1: it has the highest preference accuracy of them."
    )
    assert ship.would_change()[0].startswith("More seeds or pairs: beta=0.1 is above beta=0.2 by")


def test_a_tie_is_broken_by_quality_or_called_one() -> None:
    same = [0.85, 0.9, 0.86]
    ship = choose(compared({0.1: same, 0.2: same}))
    assert ship.number == 0
    assert "any of these will do" in ship.headline()
    assert ship.would_change() == ["More seeds or pairs: beta=0.1 and beta=0.2 tie."]
    runs = [run(beta, s, same[s - 1], 0.85 + beta / 10) for beta in (0.1, 0.2) for s in (1, 2, 3)]
    better = choose(compare(runs, MARGINS))
    assert better.number == 1
    assert "ties with beta=0.1 for the highest preference accuracy of them, and is the best of" in (
        better.headline()
    )


def test_a_setting_whose_quality_is_in_doubt_is_not_proposed_where_there_is_another() -> None:
    good, bad = (0.9, 0.9, 0.9), (0.95, 0.7, 0.95)
    runs = [run(0.1, s, 0.80 + s / 100, good[s - 1]) for s in (1, 2, 3)]
    runs += [run(0.2, s, 0.81 + s / 100, bad[s - 1]) for s in (1, 2, 3)]
    ship = choose(compare(runs, MARGINS))
    assert ship.comparison.verdict.leader == 1
    assert ship.setting.name == "beta=0.1"
    assert "of those whose quality is not in doubt" in ship.headline()
    assert any("the exact_match of beta=0.2 is below" in line for line in ship.would_change())


def guessing(settings: Mapping[float, Sequence[float]], guess: dict[float, Any]) -> Comparison:
    """Compare betas whose folders hold guesses by length of such accuracies; None: no guess."""
    found = compared(settings)
    for setting in found.settings:
        right = guess[setting.values["beta"]]
        for each in setting.runs:
            assert each.scores is not None
            if right is not None:
                each.scores["length_guess"] = (np.arange(NUM)[::-1] < right * NUM).astype(float)
    return found


def test_the_guess_by_length_is_subtracted_pair_by_pair() -> None:
    found = guessing({0.1: [0.7, 0.71, 0.72], 0.2: [0.8, 0.82, 0.84]}, {0.1: 0.6, 0.2: 0.6})
    above = gain(found, 1)
    assert above is not None
    assert above.said == "better"
    assert above.interval.estimate == pytest.approx(0.82 - 0.6)
    # A paired difference: what both get right does not count
    same = np.stack([each.scores["length_guess"] for each in found.settings[1].runs])  # type: ignore[index]
    found.accuracy.scores[1][:] = same
    equal = gain(found, 1)
    assert equal is not None
    assert equal.interval.estimate == 0


def test_a_model_that_does_not_beat_a_guess_by_length_is_told_so() -> None:
    (figure,) = choose(guessing({0.1: [0.9, 0.91, 0.92]}, {0.1: 0.6})).against_guess()
    assert figure.startswith("A guess by length alone: 0.600 [0.5")
    worse = choose(guessing({0.1: [0.5, 0.51, 0.52]}, {0.1: 0.9})).against_guess()
    assert worse[1].startswith("Not shown to be above that guess: all runs (by -39")
    assert len(choose(guessing({0.1: [0.7]}, {0.1: 0.6})).against_guess()) == 1
    one_seed = choose(guessing({0.1: [0.6]}, {0.1: 0.6})).against_guess()
    assert one_seed[1] == "Not above that guess: all runs."


def test_settings_of_other_training_pairs_may_have_another_guess_or_none() -> None:
    some = {0.1: [0.8, 0.81], 0.2: [0.7, 0.71]}
    first, second = guesses(guessing(some, {0.1: 0.6, 0.2: 0.4}))
    assert (first.name, first.settings) == ("a guess by length alone (beta=0.1)", [0])
    assert second.interval.estimate == pytest.approx(0.4)
    (only,) = guesses(partly := guessing(some, {0.1: 0.6, 0.2: None}))
    assert (only.name, only.settings) == ("a guess by length alone", [0])
    assert gain(partly, 0) is None
    assert len(choose(partly).against_guess()) == 1
    nothing = guessing(some, {0.1: None, 0.2: None})
    assert not guesses(nothing)
    assert not choose(nothing).against_guess()


def test_one_setting_has_nothing_to_choose_from_and_one_seed_shows_nothing() -> None:
    ship = choose(compared({0.1: [0.9]}))
    assert ship.headline() == "There is one setting, so there is nothing to choose from."
    assert ship.best is ship.typical
    (line,) = ship.against_untrained()
    assert line == "One seed cannot show that it is better than the untrained model."
    several = choose(compared({0.1: [0.9], 0.2: [0.8, 0.81]}))
    assert any("second and third seed of beta=0.1" in line for line in several.would_change())


def test_what_lies_near_the_edge_of_a_margin_is_said() -> None:
    figures = {0.1: (0.80, 0.92), 0.2: (0.90, 0.85), 0.3: (0.95, 0.80)}
    runs = [run(beta, s, *of) for beta, of in figures.items() for s in (1, 2, 3)]
    ship = choose(compare(runs, {**MARGINS, "exact_match": 0.1}))
    assert ship.comparison.verdict.qualities[2].worse_in == ["exact_match"]
    assert ship.setting.name == "beta=0.2"
    assert ship.would_change() == [
        "A narrower margin: the exact_match of beta=0.2 is 7.0 points below the best; "
        "10.0 points are allowed.",
        "A wider margin: with about 12.0 points of exact_match instead of 10.0 points, beta=0.3 "
        "would not be out, with a higher preference accuracy.",
    ]
    far = choose(compare(runs, {**MARGINS, "exact_match": 0.5}))
    assert far.would_change()[0].startswith("Nothing at hand")


def test_every_figure_is_better_or_worse_than_the_untrained_model_or_not_separated() -> None:
    accuracies = {0.1: [0.80, 0.81, 0.82], 0.2: [0.84, 0.85, 0.86]}
    found = compared(accuracies, exact_match=0.3, before=(0.5, 0.9, 2.0))
    said = {gain.name: gain.said for gain in gains(found, 0)}
    assert said == {"preference_accuracy": "better", "exact_match": "worse"}
    lines = " ".join(choose(found).against_untrained())
    assert "training has cost exact_match" in lines
    assert "exact_match is worse (by -60.0 points [" in lines
    # Lower is better
    found = compared(accuracies, exact_match=None, nll=1.0, before=(0.81, None, 2.0))
    preference, nll = gains(found, 0)
    assert (preference.said, nll.said) == ("not separated", "better")
    assert nll.interval.estimate == pytest.approx(-1, abs=0.05)
    assert "It is not shown that training has improved" in " ".join(
        choose(compared({0.1: [0.80, 0.81, 0.82]}, before=(0.81, 0.9, 1.0))).against_untrained()
    )


def test_the_difference_from_the_untrained_model_holds_where_there_is_none() -> None:
    rng, wrong, sweeps = np.random.default_rng(0), 0, 200
    base = scores(0.7, 0.9, 1.0, rng)
    for _ in range(sweeps):
        runs = []
        for seed in (1, 2, 3):
            # Seeds move whole runs; around the untrained model's share
            drawn = scores(0.7, 0.9, 1.0, rng)
            drawn["rejected_logp"] = drawn["chosen_logp"] - np.where(
                rng.random(NUM) < 0.7 + 0.1 * rng.normal(), 0.1, -0.1
            )
            runs.append(run(0.1, seed, scores=drawn, scores_before=base))
        wrong += gains(compare(runs, MARGINS), 0)[0].said != "not separated"
    # Two-sided intervals of 90 %; three standard errors of 200 sweeps
    assert wrong / sweeps <= 0.1 + 3 * (0.09 / sweeps) ** 0.5


def test_each_model_before_training_is_named_once_with_its_settings() -> None:
    (one,) = untrained(compared({0.1: [0.8, 0.8], 0.2: [0.8, 0.8]}))
    assert (one.name, one.settings) == ("untrained", [0, 1])
    accuracy, exact_match = one.intervals
    assert (accuracy.estimate, exact_match.estimate) == (0.5, 0.5)
    # Wilson's interval of 100 of 200
    assert (accuracy.low, accuracy.high) == pytest.approx((0.4422, 0.5578), abs=1e-4)
    runs = [run(0.1, 1), run(0.2, 1, before=(0.4, 0.5, 2.0))]
    names = [model.name for model in untrained(compare(runs, MARGINS))]
    assert names == ["untrained (beta=0.1)", "untrained (beta=0.2)"]
    values = {"beta": 0.1, "beta_schedule": "constant", "seed": 1, "start_from": "outputs/sft"}
    found = compare([run(0.1, seed, values=values | {"seed": seed}) for seed in (1, 2)], MARGINS)
    assert [model.name for model in untrained(found)] == ["before training"]
    assert (
        choose(found)
        .against_untrained()[0]
        .startswith("Against the model that training began with, preference_accuracy is better")
    )
    assert choose(found).samples()[0]["answers"][0]["of"] == "before training"


def test_each_run_is_compared_with_its_own_start() -> None:
    starts = ((1, 0.6), (2, 0.8), (3, 0.7))
    runs = [run(0.1, seed, share, before=(share, 0.5, 2.0)) for seed, share in starts]
    found = compare(runs, MARGINS)
    gain, _ = gains(found, 0)
    assert gain.interval.estimate == pytest.approx(0)
    (model,) = untrained(found)
    assert model.intervals[0].estimate == pytest.approx(0.7)
    # Over pairs and seeds, which differ: wider than over the pairs of one model
    (alone,) = untrained(compare(runs[:1], MARGINS))
    widths = [one.intervals[0].high - one.intervals[0].low for one in (model, alone)]
    assert widths[0] > widths[1]


def test_older_run_folders_without_scores_before_training_are_compared_all_the_same() -> None:
    found = compare([run(0.1, seed, scores_before=None) for seed in (1, 2)], MARGINS)
    assert untrained(found) == []
    assert choose(found).against_untrained() == [
        "How it compares with the untrained model was not measured."
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("beta=0.2", "beta_schedule=hold_then_anneal", "beta_schedule.anneal_fraction=0.2"),
        ("optimizer=galore", "train.num_epochs=2", "seed=7"),
        ("name=it's a $HOME; name", "tracker.tags=[a b,c]", "dataset.num_eval=16"),
        ("dataset=file", "dataset.train_path=my pairs, new.jsonl", "dataset.eval_path=1.10"),
    ],
)
def test_the_command_that_repeats_a_run_composes_the_same_run(
    load: Callable[..., config.Config], overrides: tuple[str, ...]
) -> None:
    recorded = [*as_typed(overrides), "resume=auto", "accept_changes=true"]
    ship = choose(compare([run(0.2, 1, overrides=recorded)], MARGINS))
    program, script, *given = shlex.split(ship.repeat)
    assert (program, script) == ("python", "launch.py")
    assert not {"resume=auto", "accept_changes=true"} & set(given)
    once, again = load(*overrides), load(*given)
    assert identity(again) == identity(once)
    assert again.name == once.name


def test_a_command_with_a_masked_secret_says_so() -> None:
    masked = redact(["tracker.tags=[password=abcdefgh1]"])
    ship = choose(compare([run(0.2, 1, overrides=masked)], MARGINS))
    assert ship.has_hidden
    assert "abcdefgh1" not in ship.repeat


def test_the_command_that_takes_the_model_exports_it(tmp_path: Path) -> None:
    folder = tmp_path / "0-beta=0.2, it's"
    (folder / "final").mkdir(parents=True)
    ship = choose(compare([run(0.2, 1, folder=folder)], MARGINS))
    assert ship.export is not None
    program = ["python", "-m", "orpo_lab", "export"]
    assert shlex.split(ship.export) == [*program, str(folder), "--merge", "--to", "shipped_model"]
    (folder / "final").rmdir()
    assert ship.export is None


def test_leading_settings_answer_the_same_prompts_side_by_side() -> None:
    other = [{**SAMPLE, "prompt": "another"}]
    runs = [
        run(beta, seed, samples=other if beta == 0.3 else [{**SAMPLE, "after": f"{beta}-{seed}"}])
        for beta in (0.1, 0.2, 0.3)
        for seed in (1, 2, 3)
    ]
    (sample,) = choose(compare(runs, MARGINS)).samples()
    assert (sample["prompt"], sample["chosen"]) == ("p", "c")
    assert [answer["of"] for answer in sample["answers"]] == ["untrained", "beta=0.1", "beta=0.2"]
    assert [answer["answer"] for answer in sample["answers"]][:1] == ["old"]
    assert choose(compare([run(0.1, 1, samples=[])], MARGINS)).samples() == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (["a", "b", "c", "d"], "a, b, c and d"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 others"),
    ],
)
def test_names_are_listed_in_words(names: list[str], said: str) -> None:
    assert listed(names) == said
