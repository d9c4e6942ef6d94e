"""The benchmark of rivals: what it chooses, and that its page shows what it has measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods
from orpo_lab.config.method import METHODS
from tests.conftest import ROOT

REPORTS = sorted((ROOT / "docs" / "results").glob("rivals_*.json"))


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_the_page_holds_the_tables_of_the_reports(file: Any) -> None:
    page = (ROOT / "docs" / "rivals.md").read_text()
    assert methods.tables(json.loads(file.read_text())) in page


def test_every_method_is_on_a_road() -> None:
    on_roads = {method for road in methods.ROADS.values() for method in road}
    assert on_roads == {*METHODS, methods.RLHF}
    assert on_roads == methods.BETAS.keys()


def tried(**figures: dict[str, float]) -> list[dict[str, Any]]:
    return [{"overrides": (name,), "after": after} for name, after in figures.items()]


def test_the_grid_takes_the_highest_accuracy_among_settings_of_good_quality() -> None:
    grid = tried(
        low={"preference_accuracy": 0.8, "exact_match": 0.97},
        good={"preference_accuracy": 0.9, "exact_match": 0.95},
        spoilt={"preference_accuracy": 1.0, "exact_match": 0.2},
    )
    assert methods._best(grid)["overrides"] == ("good",)


def test_where_no_setting_is_good_in_all_qualities_the_first_decides() -> None:
    grid = tried(
        likely={"preference_accuracy": 0.5, "chosen_nll": 1.0, "repetition": 0.9},
        varied={"preference_accuracy": 0.9, "chosen_nll": 2.0, "repetition": 0.1},
    )
    assert methods._best(grid)["overrides"] == ("likely",)


def test_a_higher_beta_does_to_each_method_what_its_class_says() -> None:
    grid = json.loads((ROOT / "docs" / "results" / "rivals_embedded.json").read_text())["grid"]
    said = {}
    for stages, found in grid.items():
        by_rate: dict[float, list[float]] = {}
        # In the order of the grid, the second beta is the higher one
        for each in found["tried"]:
            by_rate.setdefault(each["rate"], []).append(each["after"]["preference_accuracy"])
        method = stages.split()[-1]
        for low, high in (accuracies for accuracies in by_rate.values() if len(accuracies) == 2):
            if method in METHODS and abs(high - low) > 0.005:
                said[stages] = (high > low) == METHODS[method].more_beta_is_more_preference
    assert {"orpo", "cpo", "dpo", "simpo"} <= said.keys()
    assert all(said.values()), said


def test_a_stage_that_two_roads_share_is_one_folder_and_other_settings_are_another() -> None:
    bench = methods.Bench(ROOT, (), {"sft": ("optimizer.learning_rate=0.001",)})
    dpo = bench.stage(("sft", "dpo"), seed=1)
    assert dpo.before == bench.stage(("sft",), seed=1)
    other = methods.Bench(ROOT, (), {"sft": ("optimizer.learning_rate=0.003",)})
    assert other.stage(("sft", "dpo"), seed=1).name != dpo.name
    assert bench.stage(("sft", "dpo"), seed=1, size=120).name != dpo.name


@pytest.mark.parametrize(("more", "seconds"), [({}, 10), ({"reference_seconds": 4}, 14)])
def test_the_seconds_of_the_reference_are_seconds_of_training(
    tmp_path: Path, more: dict[str, float], seconds: float
) -> None:
    bench = methods.Bench(tmp_path, (), {})
    stage = bench.stage(("dpo",), seed=1)
    (tmp_path / f"{stage.name}.json").write_text(json.dumps({"cpu_seconds": 20}))
    reads = dict.fromkeys(("stages", "passes", "tokens", "forward_passes", "forward_tokens"), 1)
    train = {"wall_seconds": 10, "peak_memory_bytes": 1, "reads": reads, **more}
    (tmp_path / stage.name).mkdir()
    (tmp_path / stage.name / "summary.json").write_text(json.dumps({"train": train}))
    cost = bench.cost(stage)
    assert cost.keys() == methods.COSTS.keys()
    assert cost["wall_seconds"] == seconds
