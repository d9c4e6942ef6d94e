"""The comparison of runs, on folders written as a run writes them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from orpo_lab import metrics
from orpo_lab.__main__ import main
from orpo_lab.compare import pictures
from orpo_lab.compare.evidence import Comparison, compare
from orpo_lab.compare.page import _run_rows, setting_rows, table_of_settings
from orpo_lab.compare.read import find_runs, read_run
from orpo_lab.compare.ship import choose
from orpo_lab.compare.words import verdict_text
from orpo_lab.errors import UserError
from orpo_lab.records.results import SCORES
from orpo_lab.records.run_folder import RunFolder
from tests.conftest import ROOT

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run folder with so much accuracy and exact match on 200 pairs.

    Of the pairs not preferred rightly every third is a tie; before training all were wrong.
    """

    def run(
        name: str,
        *,
        beta: float = 0.1,
        schedule: str = "constant",
        beta_end: float = 0.0,
        seed: int = 1,
        accuracy: float = 0.8,
        exact_match: float | None = 0.9,
        state: str = "finished",
        held_out: str = "same",
        train: str = "same",
        config: dict[str, Any] | None = None,
        method: str = "orpo",
        logged: dict[str, float] | None = None,
        choices: dict[str, str] | None = None,
        contents: dict[str, str] | None = None,
        length: int | None = 5,
        repetition: float = 0.1,
        num_generations: int = 200,
        num_answered: int = 200,
        num_checked: int = 200,
        right_answers: str = "",
        guess: float | None = None,
        start: dict[str, Any] | None = None,
    ) -> Path:
        place = RunFolder(tmp_path / "sweep" / name)
        values = {"beta": beta, "beta_end": beta_end, "seed": seed, "train": {"max_steps": 10}}
        place.write("config.yaml", yaml.safe_dump(values | (config or {})))
        chosen = {"beta_schedule": schedule, "experiment": "x"} | (choices or {})
        overrides = [f"beta={beta:g}", f"beta_schedule={schedule}", f"seed={seed}"]
        place.write("choices.yaml", yaml.safe_dump({"choices": chosen, "overrides": overrides}))
        kinds = {"beta_schedule": schedule, "model": "model", "dataset": "file", "method": method}
        record = {"kinds": kinds, "contents": contents or {}, "start": start}
        place.write_json("segments.json", [record])
        reason = "" if state == "finished" else "diverged <at> step 3"
        place.set_status(state, reason, exit_code=0, config_hash=name)
        for step in (1, 5, 10):
            line = {"beta": beta, "nll_loss": 1 / step, "preference_accuracy": accuracy}
            place.append_metrics(step, line if logged is None else logged)
        if state != "finished":
            return place.path
        rng = np.random.default_rng(seed)
        num = 200
        right = rng.permutation(num) < round(accuracy * num)
        correct = None if exact_match is None else rng.permutation(num) < round(exact_match * num)
        columns: dict[str, Any] = {
            "pair": list(range(num)),
            "when": ["after"] * num,
            "chosen_logp": rng.normal(-1, 0.1, num).tolist(),
            "length_guess": [None if guess is None else pair < guess * num for pair in range(num)],
            "chosen_tokens": [2 + pair % 7 for pair in range(num)],
            "correct": [None] * num if correct is None else correct.tolist(),
            "generated_tokens": [length] * num,
            "repetition": [None if length is None else repetition] * num,
        }
        for name in ("correct", "generated_tokens", "repetition"):
            columns[name][num_answered:] = [None] * (num - num_answered)
        columns["correct"][num_checked:] = [None] * (num - num_checked)
        margin = np.where(right, 0.1, np.where(np.arange(num) % 3, -0.1, 0.0))
        columns["rejected_logp"] = (np.array(columns["chosen_logp"]) - margin).tolist()
        before = columns | {"when": ["before"] * num, "rejected_logp": [0.0] * num}
        before |= {name: columns[name][::-1] for name in ("correct", "generated_tokens")}
        tables = [pa.table(part, schema=SCORES) for part in (before, columns)]
        pq.write_table(pa.concat_tables(tables), place.path / "scores.parquet")
        after: dict[str, Any] = {
            "preference_accuracy": accuracy,
            "chosen_nll": 1.0 + 0.1 * seed,
            "generated_tokens": 5.0 + seed,
            "repetition": repetition,
            "num_generations": num_generations,
        }
        if exact_match is not None:
            after["exact_match"] = exact_match
        cost = {
            "wall_seconds": 10.0,
            "tokens_per_second": 100.0,
            "peak_memory_bytes": 10**9,
            "device": "cpu",
        }
        samples = [
            {"prompt": f"<p>{n}", "chosen": "c", "before": "old ```", "after": f"new {seed}"}
            for n in range(8)
        ]
        place.write_json("samples.json", samples)
        place.file("final").mkdir()
        summary = {
            "evaluation_seconds": {"before": 1.0, "after": 2.5},
            "before": {"chosen_nll": 2.0, "generated_tokens": 9.0},
            "after": after,
            "train": cost,
            "dataset_fingerprint": {"held_out": held_out, "train": train},
            **({"right_answers": right_answers} if right_answers else {}),
        }
        place.write_json("summary.json", summary)
        return place.path

    return run


def compare_sweep(folder: Path) -> Comparison:
    return compare(find_runs([folder]), metrics.MARGINS)


def sweep(write: Write, accuracies: dict[float, float], seeds: int = 3, **rest: Any) -> Path:
    for beta, accuracy in accuracies.items():
        for seed in range(1, seeds + 1):
            name = f"{beta}-{seed}"
            folder = write(name, beta=beta, seed=seed, accuracy=accuracy + 0.005 * seed, **rest)
    return folder.parent


def test_seeds_are_one_setting_and_settings_are_named_by_what_differs(write: Write) -> None:
    compared = compare_sweep(sweep(write, {0.1: 0.8, 0.2: 0.9}))
    assert [setting.name for setting in compared.settings] == ["beta=0.1", "beta=0.2"]
    assert [setting.seeds for setting in compared.settings] == [[1, 2, 3]] * 2
    assert compared.verdict.winner == 1
    assert "The winner is beta=0.2" in verdict_text(compared)[0]


def test_a_constant_schedule_does_not_read_beta_end_and_the_same_seed_counts_once(
    write: Write,
) -> None:
    write("0", beta_end=0.0)
    write("1", beta_end=0.05)
    folder = write("2", schedule="cosine", beta_end=0.05).parent
    compared = compare_sweep(folder)
    assert [len(setting.runs) for setting in compared.settings] == [1, 1]
    assert len(compared.runs) == 3


def test_where_files_lie_and_how_they_are_read_tells_no_settings_apart(write: Write) -> None:
    for number in (1, 2):
        dataset = {"train_path": f"{number}/train.jsonl", "num_proc": number}
        model = {"path": f"{number}/base", "full_learning_rate": number}
        folder = write(
            str(number),
            seed=number,
            config={"dataset": dataset, "model": model},
            choices={"optimizer": ("galore", "galore_8bit")[number - 1]},
            contents={"model.path": "same", "dataset.train_path": f"gz or not, {number}"},
        ).parent
    (setting,) = compare_sweep(folder).settings
    assert setting.seeds == [1, 2]


def test_other_data_and_other_models_are_other_settings(write: Write) -> None:
    for number, (path, made_of, train) in enumerate(
        [("a", "1", "x"), ("b", "2", "x"), ("b", "2", "y"), ("b", "3", "x")]
    ):
        folder = write(
            str(number),
            train=train,
            config={"model": {"path": path}, "dataset": {"train_path": f"{train}.jsonl"}},
            choices={"model": "local", "dataset": "file"},
            contents={"model.path": made_of},
        ).parent
    names = [setting.name for setting in compare_sweep(folder).settings]
    assert len(set(names)) == 4
    assert all(re.search(r"dataset=[xy]\.jsonl model=[ab] \(\w{6}\)", name) for name in names), (
        names
    )


def test_other_starts_are_other_settings(write: Write) -> None:
    for number, (place, held) in enumerate([("a/sft", "1"), ("b/sft", "1"), ("b/sft", "2")]):
        contents = {"model.path": "same", "start_from": held}
        write(str(number), seed=number, config={"start_from": place}, contents=contents)
    folder = write("3", contents={"model.path": "same"}).parent
    settings = {setting.name: len(setting.runs) for setting in compare_sweep(folder).settings}
    assert sorted(settings.values()) == [1, 1, 2]
    assert all(re.fullmatch(r"start_from=(null|[ab]/sft) \(\w{6}\)", name) for name in settings)


def start(write: Write, name: str, **rest: Any) -> dict[str, Any]:
    """Return the keys with which a run starts from a finished run that is written elsewhere."""
    place = RunFolder(write(f"../{name}", **rest))
    return {
        "config": {"start_from": str(place.path)},
        "contents": {"model.path": "same", "start_from": f"content of {name}"},
        "start": place.as_start(),
    }


def test_seeds_of_a_start_are_replicates_of_one_setting(write: Write) -> None:
    for seed in (1, 2, 3):
        begun = start(write, f"sft{seed}", seed=seed, method="sft")
        assert begun["start"]["seeds"] == [seed]
        write(f"dpo{seed}", seed=seed, method="dpo", **begun)
        if seed == 2:
            write("dpo1-2", seed=1, method="dpo", **begun)
            write("again", seed=1, method="dpo", **begun)
        folder = write(f"orpo{seed}", seed=seed, contents={"model.path": "same"}).parent
    dpo, orpo = compare_sweep(folder).settings
    assert (dpo.name, orpo.name) == (
        "method=dpo start_from=sft",
        "method=orpo start_from=null",
    )
    # Once for the same seeds, but not for one seed from two starts
    assert sorted(run.seeds for run in dpo.runs) == [[1, 1], [1, 2], [2, 2], [3, 3]]
    assert orpo.seeds == [1, 2, 3]
    rows = _run_rows(sorted(dpo.runs, key=lambda run: run.seeds))
    assert [row["seed"] for row in rows] == ["1", "1 (start 2)", "2", "3"]


def test_starts_are_named_by_what_tells_them_apart(write: Write) -> None:
    for steps in (10, 20):
        for seed in (1, 2):
            config = {"train": {"max_steps": steps}}
            name = f"{steps}-{seed}"
            begun = start(write, f"sft{name}", seed=seed, method="sft", config=config)
            write(f"dpo{name}", seed=seed, **begun)
            last = start(write, f"kto{name}", seed=seed, method="kto", **begun)
            folder = write(f"last{name}", seed=seed, **last).parent
    compared = compare_sweep(folder)
    assert {setting.name: len(setting.runs) for setting in compared.settings} == {
        "start_from=sft(train.max_steps=10)": 2,
        "start_from=sft(train.max_steps=20)": 2,
        "start_from=kto(start_from=sft(train.max_steps=10) train.max_steps=10)": 2,
        "start_from=kto(start_from=sft(train.max_steps=20) train.max_steps=10)": 2,
    }


def test_named_models_are_called_by_their_names(write: Write) -> None:
    for name in ("tiny", "phi2"):
        folder = write(
            name,
            config={"model": {"path": f"org/{name}"}},
            choices={"model": name},
            contents={"model.path": f"org/{name}"},
        ).parent
    names = [setting.name for setting in compare_sweep(folder).settings]
    assert names == ["model=phi2", "model=tiny"]


def test_settings_whose_names_round_to_the_same_stay_apart(write: Write) -> None:
    write("0", beta=0.1)
    folder = write("1", beta=0.1000000001).parent
    assert [setting.name for setting in compare_sweep(folder).settings] == ["beta=0.1", "beta=0.1"]


def test_settings_stand_in_the_order_of_their_numbers(write: Write) -> None:
    rates = [2e-3, 1e-5, 1e-4, 3e-4]
    for rate in rates:
        folder = write(f"{rate}", config={"optimizer": {"learning_rate": rate}}).parent
    names = [f"optimizer.learning_rate={rate:g}" for rate in sorted(rates)]
    assert [setting.name for setting in compare_sweep(folder).settings] == names


def test_with_one_seed_nothing_is_separated(write: Write) -> None:
    compared = compare_sweep(sweep(write, {0.1: 0.5, 0.2: 0.9}, seeds=1))
    assert compared.verdict.winner is None
    assert "One seed cannot separate these" in verdict_text(compared)[0]


@pytest.mark.parametrize(("accuracy", "leads"), [(0.5, "beta=0.2 leads"), (0.99, "on one seed.")])
def test_a_setting_with_one_seed_is_named(write: Write, accuracy: float, leads: str) -> None:
    sweep(write, {0.1: 0.6, 0.2: 0.9})
    folder = write("one", beta=0.3, seed=1, accuracy=accuracy).parent
    lines = verdict_text(compare_sweep(folder))
    assert leads in lines[0]
    assert lines[1].startswith("With one seed a setting can neither win nor be beaten")
    assert lines[1].endswith(": beta=0.3.")


def test_what_is_not_separated_says_what_it_would_take(write: Write) -> None:
    sweep(write, {0.1: 0.85})
    for seed, accuracy in enumerate((0.84, 0.86, 0.9), start=1):
        folder = write(f"0.2-{seed}", beta=0.2, seed=seed, accuracy=accuracy).parent
    text = " ".join(verdict_text(compare_sweep(folder)))
    assert "does not separate beta=0.2" in text
    assert re.search(r"about \d+ seeds a setting|take them as equal", text)


def test_accuracy_bought_with_quality_does_not_win_and_is_warned_of(write: Write) -> None:
    sweep(write, {0.1: 0.7, 0.2: 0.8}, exact_match=0.9)
    folder = sweep(write, {1.0: 0.95}, exact_match=0.4)
    compared = compare_sweep(folder)
    text = " ".join(verdict_text(compared))
    assert "The winner is beta=0.2" in text
    assert "Out for their quality: beta=1 (exact_match)" in text
    assert "beta=1 looks over-optimised" in compared.warnings[0]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_where_beta_holds_a_model_back_a_low_one_is_over_optimised(
    write: Write, method: str
) -> None:
    sweep(write, {1.0: 0.7, 0.2: 0.8}, exact_match=0.9, method=method)
    folder = sweep(write, {0.1: 0.95}, exact_match=0.4, method=method)
    (warning,) = compare_sweep(folder).warnings
    assert "beta=0.1 looks over-optimised" in warning


@pytest.mark.parametrize("method", ["orpo", "simpo", "cpo"])
def test_where_beta_drives_a_model_on_a_low_one_is_not_over_optimised(
    write: Write, method: str
) -> None:
    sweep(write, {1.0: 0.7, 0.2: 0.8}, exact_match=0.9, method=method)
    folder = sweep(write, {0.1: 0.95}, exact_match=0.4, method=method)
    assert not compare_sweep(folder).warnings


def test_settings_of_several_methods_are_named_by_method(write: Write) -> None:
    own = {"orpo": {"penalty": "log_sigmoid"}, "cpo": {"sft_weight": 1.0}}
    own |= {"simpo": {"sft_weight": 0.0, "gamma": 0.5}, "sft": {"nll_scope": "completion"}}
    betas = {"orpo": 0.1, "cpo": 0.1, "simpo": 2.0, "sft": 0.0}
    for method, keys in own.items():
        for seed in (1, 2):
            given = {"method": method, "beta": betas[method], "config": {"method": keys}}
            folder = write(f"{method}-{seed}", seed=seed, **given).parent
    names = [setting.name for setting in compare_sweep(folder).settings]
    assert names == ["method=cpo", "method=orpo", "method=sft", "method=simpo"]
    write("other", method="orpo", beta=0.5, config={"method": own["orpo"]})
    named = [setting.name for setting in compare_sweep(folder).settings]
    assert named[1:3] == ["beta=0.1 method=orpo", "beta=0.5 method=orpo"]
    # SFT reads no beta
    assert named[3] == "method=sft"


def test_a_beta_that_no_method_reads_tells_no_settings_apart(write: Write) -> None:
    write("0", method="sft", beta=0.0)
    folder = write("1", method="sft", beta=0.5, seed=2).parent
    (setting,) = compare_sweep(folder).settings
    assert setting.seeds == [1, 2]


def test_pictures_across_methods_show_only_what_compares_across_methods(write: Write) -> None:
    folder = sweep(write, {0.1: 0.8, 0.2: 0.9})
    assert pictures.draw(compare_sweep(folder)).keys() == {
        "pareto",
        "beta",
        "nll_loss",
        "preference_accuracy",
    }
    write("sft", method="sft", logged={"nll_loss": 1.0, "logps/chosen": -1.0})
    drawn = pictures.draw(compare_sweep(folder))
    assert drawn.keys() == {"pareto", "preference_accuracy"}
    caption, _ = drawn["preference_accuracy"]
    assert caption.endswith("; not logged by method=sft")


def test_a_race_is_compared_by_the_levels_of_its_looks_whoever_compares(write: Write) -> None:
    folder = sweep(write, {0.1: 0.6, 0.2: 0.8, 0.5: 0.9})
    once = compare_sweep(folder)
    (folder / "sweep.json").write_text('["of another program"]')
    assert compare_sweep(folder).accuracy.max_seeds is None
    (folder / "sweep.json").write_text('{"max_seeds": 5}')
    raced = compare_sweep(folder)
    assert raced.accuracy.max_seeds == raced.verdict.contest.max_seeds == 5
    assert {quality.measure.max_seeds for quality in raced.qualities} == {5}
    assert raced.verdict.lead is not None
    assert once.verdict.lead is not None
    assert raced.verdict.lead.low < once.verdict.lead.low


def test_a_metric_of_failed_runs_alone_has_no_picture(write: Write) -> None:
    write("0", logged={"loss": 1.0})
    folder = write("1", seed=2, state="failed").parent
    assert pictures.draw(compare_sweep(folder)).keys() == {"pareto"}


def scores_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's scores after training."""
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    return [row for row in rows if row["when"] == "after"]


def test_where_answers_cannot_be_checked_quality_is_nll_and_repetition(write: Write) -> None:
    told = {"exact_match": None, "num_answered": 150}
    folders = [
        write(str(number), beta=number, repetition=0.1 * number, **told) for number in (1, 2)
    ]
    margins = {"exact_match": 0.1, "chosen_nll": 0.2, "repetition": 0.3}
    compared = compare(find_runs(folders), margins)
    nll, repetition = compared.qualities
    assert (nll.name, nll.margin, nll.sign) == ("chosen_nll", 0.2, -1)
    assert (repetition.name, repetition.margin, repetition.sign) == ("repetition", 0.3, -1)
    for number, folder in enumerate(folders):
        rows = scores_of(folder)
        tokens = sum(row["chosen_tokens"] for row in rows)
        expected = -sum(row["chosen_logp"] * row["chosen_tokens"] for row in rows) / tokens
        assert nll.sign * nll.measure.value(number) == pytest.approx(expected)
        said = repetition.sign * repetition.measure.value(number)
        assert said == pytest.approx(0.1 * (number + 1))


def test_exact_match_is_a_share_of_the_prompts_that_were_answered(write: Write) -> None:
    folder = write("0", num_answered=37)
    (quality,) = compare_sweep(folder.parent).qualities
    correct = [row["correct"] for row in scores_of(folder) if row["correct"] is not None]
    assert len(correct) == 37
    assert quality.measure.value(0) == pytest.approx(sum(correct) / 37)


def test_exact_match_is_a_share_of_the_answers_that_can_be_checked(write: Write) -> None:
    folder = write("0", num_answered=37, num_checked=20, right_answers="same")
    (quality,) = compare_sweep(folder.parent).qualities
    correct = [row["correct"] for row in scores_of(folder) if row["correct"] is not None]
    assert len(correct) == 20
    assert quality.measure.value(0) == pytest.approx(sum(correct) / 20)


def test_runs_whose_answers_were_checked_in_different_ways_are_refused(write: Write) -> None:
    write("0", beta=0.1, right_answers="by the last number")
    folder = write("1", beta=0.2, right_answers="by a pattern").parent
    with pytest.raises(UserError, match=r"dataset.checker, its pattern, or the right answers"):
        compare_sweep(folder)
    # Beside a run that checked none, there is no exact match to compare
    (folder / "1" / "summary.json").write_text((folder / "0" / "summary.json").read_text())
    write("2", beta=0.3, exact_match=None)
    found = [quality.name for quality in compare_sweep(folder).qualities]
    assert found == ["chosen_nll", "repetition"]


@pytest.mark.parametrize(("length", "ratio"), [(8, "1.60"), (3, "0.60")])
def test_answers_that_grow_long_or_short_are_warned_of(
    write: Write, length: int, ratio: str
) -> None:
    write("0", beta=0.1)
    folder = write("1", beta=0.2, length=length).parent
    (warning,) = compare_sweep(folder).warnings
    assert warning.startswith(f"greedy answers of beta=0.2 are {ratio} times as long")


def test_the_tables_hold_the_means_of_unequal_numbers_of_seeds_and_every_runs_cost(
    write: Write,
) -> None:
    sweep(write, {10.0: 0.8}, seeds=3)
    folder = sweep(write, {2.0: 0.7}, seeds=2)
    compared = compare_sweep(folder)
    rows = setting_rows(compared)
    assert [(row["setting"], row["seeds"]) for row in rows] == [("beta=2", "2"), ("beta=10", "3")]
    assert [row["preference_accuracy"].split()[0] for row in rows] == ["0.708", "0.810"]
    assert [row["generated_tokens"] for row in rows] == ["6.500", "7.000"]
    assert [row["chosen_nll"] for row in rows] == ["1.150", "1.200"]
    for run in _run_rows(compared.runs):
        assert (run["wall time (s)"], run["tokens"], run["GPU-hours"]) == ("13.5", "1000", "0")
        assert "preference share" not in run, "not measured"
    first, *others = compared.runs
    assert first.summary is not None
    first.summary["train"]["preference_share"] = 0.25
    first.summary["train"]["reference_seconds"] = 4.0
    rows = _run_rows([first, *others])
    assert [run["preference share"] for run in rows] == ["0.250", *[""] * len(others)]
    assert [run["wall time (s)"] for run in rows] == ["17.5", *["13.5"] * len(others)]


def test_a_run_is_what_it_was_at_its_last_start(write: Write) -> None:
    folder = write("0", contents={"model.path": "first"})
    place = RunFolder(folder)
    last = {"kinds": {"beta_schedule": "cosine"}, "contents": {"model.path": "last"}}
    place.write_json("segments.json", [*place.segments(), last])
    run = read_run(folder)
    assert run.contents == {"model.path": "last"}
    assert run.values["beta_schedule"] == "cosine"


def test_a_folder_that_is_given_twice_is_read_once(write: Write, tmp_path: Path) -> None:
    folder = write("0").parent
    (tmp_path / "link").symlink_to(folder)
    assert len(find_runs([folder, tmp_path / "link", folder / "0"])) == 1


def test_the_report_lands_in_the_first_folder_and_lists_what_did_not_finish(
    write: Write, tmp_path: Path
) -> None:
    folder = write("0").parent
    write("half", beta=7.0, state="stopped")
    (tmp_path / "other").mkdir()
    shutil.copytree(folder / "0", tmp_path / "other" / "1")
    main(["compare", str(folder), str(tmp_path / "other")])
    text = (folder / "report.md").read_text()
    assert "**Not in the comparison:** half (stopped: diverged <at> step 3)." in text
    assert not (tmp_path / "other" / "report.md").exists()
    main(["compare", str(folder), "--out", str(tmp_path / "other"), "--exact-match-margin", "0.5"])
    assert "at most 0.5 of exact_match below" in (tmp_path / "other" / "report.md").read_text()


def test_without_answers_quality_is_nll_alone(write: Write) -> None:
    folder = sweep(write, {0.1: 0.8, 0.2: 0.9}, exact_match=None, length=None)
    compared = compare_sweep(folder)
    assert [quality.name for quality in compared.qualities] == ["chosen_nll"]
    assert compared.warnings == []


def test_reports_hold_everything_and_ask_for_nothing(write: Write) -> None:
    folder = sweep(write, {0.1: 0.8, 0.2: 0.9})
    write("failed", beta=7.0, state="failed")
    main(["compare", str(folder)])
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for words in ("The winner is beta=0.2", "failed is not in the comparison", "0.2-3"):
        assert words in page
    for report in (page, text):
        assert report.index("Ship beta=0.2, the winner") < report.index("The winner is beta=0.2")
        assert f"orpo_lab export {folder}/0.2-3 --merge --to shipped_model" in report
        assert "python launch.py beta=0.2 beta_schedule=constant seed=3" in report
    assert "&lt;p&gt;0" in page
    assert "````text\nold ```\n````" in text
    assert "diverged &lt;at&gt; step 3" in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    # Four letters stand by chance in a picture's base64, too
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert page.count("<img") == 4
    for name in re.findall(r"\]\((report/\w+\.png)\)", text):
        assert (folder / name).stat().st_size > 5000
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert [table.count("\n") for table in tables] == [2 + 3, 2 + 7]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_untrained_model_has_a_row_of_its_own(write: Write) -> None:
    compared = compare_sweep(sweep(write, {0.1: 0.8, 0.2: 0.9}))
    *settings, row = table_of_settings(compared, choose(compared))
    assert settings == setting_rows(compared)
    assert (row["setting"], row["seeds"]) == ("untrained", "")
    assert row["preference_accuracy"] == "0.000 [0.000, 0.013]"
    assert row["exact_match"].startswith("0.900 [")
    assert (row["chosen_nll"], row["generated_tokens"]) == ("2.000", "9.000")
    assert row["verdict"] == (
        "beta=0.2 is better in preference_accuracy, not separated in exact_match"
    )


def test_a_guess_by_length_stands_beside_the_settings_in_every_report(write: Write) -> None:
    folder = sweep(write, {0.1: 0.55, 0.2: 0.6}, guess=0.61)
    main(["compare", str(folder)])
    compared, report = compare_sweep(folder), read_report(folder)
    *_, row = table_of_settings(compared, choose(compared))
    assert row["setting"] == "a guess by length alone"
    assert row["preference_accuracy"].startswith("0.610 [0.5")
    figure, not_above = verdict_text(compared)[-2:]
    assert figure.startswith("A guess by length alone: 0.610 [0.5")
    assert not_above.startswith("Not shown to be above that guess: beta=0.2 (by ")
    for name in ("report.html", "report.md"):
        assert (folder / name).read_text().count(not_above) == 2
    assert report["length_guesses"][0]["preference_accuracy"]["estimate"] == 0.61
    assert report["length_guesses"][0]["settings"] == ["beta=0.1", "beta=0.2"]
    assert report["ship"]["against_length_guess"]["said"] == "not separated"


def read_report(folder: Path) -> Any:
    """Return the content of `report.json`; numbers that JSON does not have are refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def test_programs_read_the_report_too(write: Write) -> None:
    folder = sweep(write, {0.1: 0.8, 0.2: 0.9})
    write("failed", beta=7.0, state="failed")
    main(["compare", str(folder)])
    report, compared = read_report(folder), compare_sweep(folder)
    ship = report["ship"]
    assert (ship["setting"], ship["is_winner"]) == ("beta=0.2", True)
    assert (ship["best"]["folder"], ship["typical"]["folder"]) == (
        str(folder / "0.2-3"),
        str(folder / "0.2-2"),
    )
    assert ship["best"]["figures"]["preference_accuracy"] == pytest.approx(0.915)
    assert ship["against_untrained"]["preference_accuracy"]["said"] == "better"
    assert len(ship["samples"]) == 4
    assert report["verdict"]["winner"] == "beta=0.2"
    assert report["verdict"]["sentences"] == verdict_text(compared)
    assert [setting["seeds"] for setting in report["settings"]] == [[1, 2, 3]] * 2
    interval = compared.verdict.accuracies[1]
    assert report["settings"][1]["figures"]["preference_accuracy"] == vars(interval)
    assert [model["name"] for model in report["untrained"]] == ["untrained"]
    assert {run["state"] for run in report["runs"]} == {"finished", "failed"}
    explained = (ROOT / "docs" / "sweeps.md").read_text()
    named = [report, ship, report["verdict"], report["settings"][0], report["runs"][0]]
    assert [key for keys in named for key in keys if f"`{key}`" not in explained] == []


@pytest.mark.parametrize("exact_match", [0.9, None])
def test_the_report_of_one_run_has_no_number_that_json_lacks(
    write: Write, exact_match: float | None
) -> None:
    folder = write("0", exact_match=exact_match)
    main(["compare", str(folder)])
    report = read_report(folder)
    (setting,) = report["settings"]
    assert setting["figures"]["preference_accuracy"] == {"estimate": 0.8, "low": None, "high": None}
    # Lower is better, and the figure has the sign in which it is measured
    assert all(figure["estimate"] >= 0 for figure in setting["figures"].values())
    assert report["ship"]["best"] == report["ship"]["typical"]
    assert report["verdict"]["lead"] is None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_report_opens_in_a_browser_without_a_request_and_fits_its_width(
    write: Write, tmp_path: Path, width: int
) -> None:
    long = {"optimizer": {"a_key_with_a_long_name": "a_value_without_a_space" * 3}}
    sweep(write, {0.1: 0.8}, config=long)
    folder = sweep(write, {0.2: 0.9})
    main(["compare", str(folder)])
    report, page = folder / "report.html", folder / "page.html"
    # In a frame, since a window of the browser has 500 pixels at least
    measure = "document.documentElement.scrollWidth + ' of ' + innerWidth"
    tell = f"<script>parent.postMessage({measure} + ', ' + document.images.length, '*')</script>"
    report.write_text(report.read_text() + tell)
    page.write_text(
        "<script>onmessage = message => document.title = message.data</script>"
        f'<iframe src="report.html" style="border: 0; width: {width}px"></iframe>'
    )
    log = tmp_path / "net.json"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}",
        f"--log-net-log={log}",
        "--window-size=1400,3000",
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"<title>{width} of {width}, 4</title>" in done.stdout
    asked = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    assert [url for url in asked if not re.search("google|gstatic|chrome", url)] == []


def test_a_run_that_was_resumed_differently_is_named(write: Write) -> None:
    folder = write("0")
    summary = json.loads((folder / "summary.json").read_text())
    summary["changes"] = [{}, {"beta": [0.1, 0.5]}]
    (folder / "summary.json").write_text(json.dumps(summary))
    compared = compare_sweep(folder.parent)
    assert "0 was resumed with changes of beta" in compared.warnings


@pytest.mark.parametrize("other", [{"held_out": "other"}, {"num_generations": 10}])
def test_different_held_out_pairs_are_refused(write: Write, other: dict[str, Any]) -> None:
    write("0")
    folder = write("1", **other).parent
    with pytest.raises(UserError, match="different held-out pairs"):
        compare_sweep(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *[
            (name, "0 cannot be read as a run folder")
            for name in ("summary.json", "choices.yaml", "scores.parquet")
        ],
        ("status.json", r"no run has finished with scores to compare \(0: damaged\)"),
    ],
)
def test_a_damaged_run_folder_is_one_clear_line(write: Write, name: str, said: str) -> None:
    folder = write("0")
    (folder / name).write_bytes(b"{ \x00")
    with pytest.raises(UserError, match=said):
        compare_sweep(folder.parent)


def test_the_command_line_refuses_in_one_line(tmp_path: Path, write: Write) -> None:
    folder = write("0", state="failed").parent
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is not a run folder"),
        ([str(folder)], "no run has finished"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "orpo_lab", "compare", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr


def test_it_imports_no_torch() -> None:
    code = "import sys, orpo_lab.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_numbers_in_names_are_in_their_order(write: Write) -> None:
    for name in ("10-a", "9-a", "1-b"):
        folder = write(name, seed=int(name.split("-")[0])).parent
    names = [run.folder.name for run in find_runs([folder])]
    assert names == ["1-b", "9-a", "10-a"]
    assert json.loads((folder / "9-a" / "status.json").read_text())["config_hash"] == "9-a"


def test_a_tie_is_called_one(write: Write) -> None:
    for beta in (0.1, 0.2):
        folder = write(str(beta), beta=beta).parent
    compared = compare_sweep(folder)
    said = " ".join(verdict_text(compared))
    assert "beta=0.1 and beta=0.2 tie for the highest preference accuracy (0.800)" in said
    rows = setting_rows(compared)
    assert [row["verdict"] for row in rows] == ["tied for the highest, not separated"] * 2


def test_a_schedule_of_ones_own_is_drawn(write: Write) -> None:
    for name in ("exponential", "constant"):
        folder = write(name, schedule=name).parent
    main(["compare", str(folder)])
    assert (folder / "report" / "pareto.png").is_file()


def test_a_judges_win_rate_stands_beside_the_qualities_and_decides_nothing(write: Write) -> None:
    runs = [write("a", beta=0.1), write("b", beta=0.3), write("c", beta=0.5)]
    unjudged = verdict_text(compare(find_runs(runs), metrics.MARGINS))
    for run, rate, is_evidence in zip(runs, (0.25, 0.75, None), (True, False, None), strict=True):
        place = RunFolder(run)
        said = {"judge/model": "m", "judge/is_evidence": is_evidence, "judge/win_rate": rate}
        said |= {"judge/win_rate_low": 0.125, "judge/win_rate_high": 0.5}
        if rate:
            place.write_json("summary.json", place.read_json("summary.json") | said)
    comparison = compare(find_runs(runs), metrics.MARGINS)
    assert verdict_text(comparison) == unjudged
    rows = table_of_settings(comparison, choose(comparison))
    rates = [row["judge/win_rate"] for row in rows]
    assert rates[:3] == ["0.250 [0.125, 0.500]", "no evidence", ""]
    assert set(rates[3:]) == {""}
    folder = runs[0].parent
    main(["compare", *map(str, runs), "--out", str(folder)])
    for name in ("report.md", "report.html"):
        assert "judge/win_rate: how often m prefers" in (folder / name).read_text()
    judged = [run["judged"] for run in json.loads((folder / "report.json").read_text())["runs"]]
    assert [one.get("judge/win_rate") for one in judged] == [0.25, 0.75, None]
