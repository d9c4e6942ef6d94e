"""The dial: mixtures of two runs, and what they predict."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from orpo_lab.__main__ import main
from orpo_lab.compare.evidence import Setting
from orpo_lab.compare.read import read_run
from orpo_lab.compare.verdict import Interval
from orpo_lab.config.beta_schedule import Linear
from orpo_lab.config.identity import identity
from orpo_lab.dial.ends import Ends, find_ends, mean_beta
from orpo_lab.dial.front import Front, Gaps
from orpo_lab.dial.mixture import Dial, Weights
from orpo_lab.errors import UserError
from orpo_lab.evaluate import Evaluation, Generation, Scores
from orpo_lab.finished import read_config
from orpo_lab.records.run_folder import RunFolder
from tests.test_run_folder import TWO_STEPS, start, write_pairs

IDS = torch.arange(3, 40)[None]
# Steps so large that two betas end far apart
RUN = (*TWO_STEPS, "train.max_steps=4", "train.warmup_steps=0", "optimizer.learning_rate=3e-3")
LOW, HIGH = "beta=0.1", "beta=2"
# A scale of 2, and another rank than the default's
OTHER_SHAPE = ("optimizer.r=4", "optimizer.alpha=8")
RUNS = {
    "low": (LOW,),
    "high": (HIGH, *OTHER_SHAPE),
    "adamw-low": (LOW, "optimizer=adamw", "optimizer.learning_rate=1e-3"),
    "adamw-high": (HIGH, "optimizer=adamw", "optimizer.learning_rate=1e-3"),
}
# Copies of runs that say they had other settings: what is told of them is not their weights
COPIES: dict[str, tuple[str, dict[str, Any]]] = {
    "middle": ("low", {"beta": 0.5}),
    "low-2": ("low", {"seed": 2}),
    "high-2": ("high", {"seed": 2}),
    "annealed": ("high", {"beta_schedule": "linear"}),
    "beyond": ("low", {"beta": 5.0}),
    "faster": ("low", {"beta": 0.5, "optimizer.learning_rate": 1e-3}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs and the finished runs of RUNS and COPIES."""
    place = tmp_path_factory.mktemp("runs")
    write_pairs(place / "pairs.jsonl")
    with contextlib.chdir(place):
        for name, overrides in RUNS.items():
            start(*RUN, *overrides, f"hydra.run.dir={name}")
    for name, (source, changes) in COPIES.items():
        copy(place / source, place / name, **changes)
    return place


def copy(run: Path, folder: Path, **changes: Any) -> Path:
    """Copy a run, with other values of some keys in its configuration."""
    shutil.copytree(run, folder)
    settings, (record,) = RunFolder(folder).read_yaml("config.yaml"), RunFolder(folder).segments()
    for key, value in changes.items():
        group, _, last = key.rpartition(".")
        if key in record["kinds"]:
            record["kinds"][key] = value
        else:
            (settings[group] if group else settings)[last] = value
    RunFolder(folder).write("config.yaml", yaml.safe_dump(settings))
    RunFolder(folder).write_json("segments.json", [record])
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the runs, as the working directory: it is not written to."""
    monkeypatch.chdir(runs)
    return runs


def logits(network: Any) -> Tensor:
    """Return the logits of every next token, [T, V]."""
    network.eval()
    with torch.no_grad():
        return network(input_ids=IDS).logits[0].float()


def change_of(final: Path) -> dict[str, Tensor]:
    """Return what the adapters in a folder add to each layer's weight, in fp64, by its name."""
    settings = json.loads((final / "adapter_config.json").read_text())
    factors = load_file(final / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    return {
        name: scale * factors[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in factors.items()
        if "lora_A" in name
    }


# The mixtures


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_of_adapters_mixes_what_they_add_to_the_weights(
    here: Path, tmp_path: Path, share: float
) -> None:
    dial = Dial(Path("low"), Path("high"))
    dial.mixer.turn(0.7)
    dial.mixer.turn(share)
    measured = logits(dial.network)
    dial.save(share, tmp_path / "mixture", "a card")
    low, high = change_of(Path("low/final")), change_of(Path("high/final"))
    far, near = 0.0, 0.0
    for name, found in change_of(tmp_path / "mixture").items():
        expected = (1 - share) * low[name] + share * high[name]
        near = max(near, float((found - expected).abs().max()))
        far = max(far, float((low[name] - high[name]).abs().max()))
    assert near < 1e-6 * far
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(saved), measured)
    assert (tmp_path / "mixture" / "README.md").read_text() == "a card"


def test_a_mixture_of_whole_weights_is_their_weighted_mean(here: Path, tmp_path: Path) -> None:
    dial = Dial(Path("adamw-low"), Path("adamw-high"))
    dial.save(0.25, tmp_path / "mixture", "")
    low, high = (
        load_file(f"{name}/final/model.safetensors") for name in ("adamw-low", "adamw-high")
    )
    for name, found in load_file(tmp_path / "mixture" / "model.safetensors").items():
        assert not torch.equal(low[name], high[name])
        expected = 0.75 * low[name].double() + 0.25 * high[name].double()
        assert (found - expected).abs().max() < 1e-6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(saved), logits(dial.network))


def test_weights_of_bf16_folders_are_mixed_on_average_and_end_where_the_runs_did() -> None:
    low, high = (nn.Linear(100, 100, bias=False) for _ in range(2))
    low.weight.data.fill_(1.0)
    high.weight.data.fill_(1 + 2**-7)  # the next number in bf16
    network: Any = low
    network.dtype = torch.float32
    mixer = Weights(network, high, torch.bfloat16)
    mixer.turn(0.3)
    assert set(network.weight.unique().tolist()) == {1.0, 1 + 2**-7}
    assert float((network.weight.detach() - 1).mean() * 2**7) == pytest.approx(0.3, abs=0.03)
    for share, value in ((0.0, 1.0), (1.0, 1 + 2**-7)):
        mixer.turn(share)
        assert (network.weight == value).all()


@pytest.mark.parametrize("kind", ["", "adamw-"])
def test_both_ends_come_to_the_figures_of_their_runs_and_the_middle_to_others(
    here: Path, kind: str
) -> None:
    low, high = Path(f"{kind}low"), Path(f"{kind}high")
    found = Dial(low, high).measure([0.0, 0.5, 1.0])
    after = [json.loads((run / "summary.json").read_text())["after"] for run in (low, high)]
    assert [found[0].metrics, found[2].metrics] == after
    margins = [evaluation.metrics["logp_margin"] for evaluation in found]
    assert len(set(margins)) == 3


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("high", {"seed": 2}, "differ in seed, and a mixture has to differ in beta"),
        (
            "high",
            {"optimizer.learning_rate": 0.5, "train.batch_size": 2},
            "differ in optimizer.learning_rate, train.batch_size, and",
        ),
        ("adamw-high", {}, "differ in optimizer, optimizer.dropout, optimizer.learning_rate, and"),
        ("high", {"beta": 0.1}, "have the same mean beta, 0.1: nothing lies between"),
    ],
)
def test_runs_that_differ_in_more_than_beta_are_refused_in_one_line(
    here: Path, tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    other = copy(Path(name), tmp_path / "run", **changes)
    with pytest.raises(SystemExit, match=said) as end:
        main(["dial", "low", str(other)])
    assert "\n" not in str(end.value.code)


def test_runs_on_other_data_and_runs_without_a_result_are_refused(
    here: Path, tmp_path: Path
) -> None:
    for name, said in (
        ("data", "differ in dataset, and"),
        ("stopped", "it is stopped.; finish it with resume="),
        ("empty", "has no final/; finish it"),
    ):
        other = copy(Path("high"), tmp_path / name)
        if name == "data":
            measured_elsewhere(other)
        elif name == "stopped":
            RunFolder(other).set_status("stopped", "SIGTERM", exit_code=75)
        else:
            shutil.rmtree(other / "final")
        with pytest.raises(SystemExit, match=said):
            main(["dial", "low", str(other)])


def measured_elsewhere(run: Path) -> None:
    """Let a run say that it was measured on other pairs."""
    summary = json.loads((run / "summary.json").read_text())
    summary["dataset_fingerprint"]["held_out"] = "other"
    RunFolder(run).write_json("summary.json", summary)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "high"], "error: nowhere cannot be read as a run folder"),
        (["low", "high", "--points", "1"], "error: --points 1 must be at least 2"),
        (["low", "high", "--share", "1.5"], "error: --share 1.5 must lie between 0 and 1"),
        (["low", "high", "--export", "low"], "error: low exists already; choose a new folder"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(here: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["dial", *arguments])
    assert str(end.value.code).startswith(said)
    assert "\n" not in str(end.value.code)


def test_pairs_that_have_changed_since_the_runs_are_refused(here: Path, tmp_path: Path) -> None:
    low, high = (copy(Path(name), tmp_path / name) for name in ("low", "high"))
    measured_elsewhere(low)
    with pytest.raises(UserError, match=r"held-out pairs are not those that .*low was measured on"):
        Dial(low, high)


def test_a_configuration_of_another_version_is_refused(here: Path, tmp_path: Path) -> None:
    other = copy(Path("low"), tmp_path / "other", **{"train.colour": "blue"})
    with pytest.raises(UserError, match=r"other/config.yaml cannot be read; another version"):
        read_config(other)


# Which runs take part, and which mixture stands for a beta


def test_a_run_is_read_back_as_it_was_configured(here: Path) -> None:
    read = read_config(Path("annealed"))
    assert (read.beta, read.optimizer.learning_rate) == (2.0, 3e-3)
    assert isinstance(read.beta_schedule, Linear)
    assert read.dataset.num_eval == 4


def test_a_run_from_before_a_key_of_columns_is_read_back(here: Path, tmp_path: Path) -> None:
    other = copy(Path("low"), tmp_path / "other")
    values = RunFolder(other).read_yaml("config.yaml")
    for key in ("system", "input", "history"):
        del values["dataset"]["columns"][key]
    del values["dataset"]["faults"]["ignored_column"]
    RunFolder(other).write("config.yaml", yaml.safe_dump(values))
    was, now = read_config(other), read_config(Path("low"))
    assert was.dataset == now.dataset
    assert identity(was) == identity(now)


def test_the_dial_of_every_seed_and_the_settings_between_are_found(here: Path) -> None:
    given = [Path(name) for name in ("low", *COPIES)]
    ends = find_ends(Path("low"), Path("high"), given)
    named = {seed: [run.folder.name for run in pair] for seed, pair in ends.by_seed.items()}
    assert named == {42: ["low", "high"], 2: ["low-2", "high-2"]}
    assert [setting.runs[0].folder.name for setting in ends.trained] == ["middle", "annealed"]
    assert len(ends.left_out) == 2
    assert "faster differs in optimizer.learning_rate" in ends.left_out[0]
    assert "beta=5" in ends.left_out[1]


def test_the_rule_is_linear_in_the_logarithm_of_the_mean_beta(here: Path) -> None:
    ends = find_ends(Path("low"), Path("high"), [Path("middle"), Path("annealed")])
    middle, annealed = ends.trained
    assert ends.share_of(middle) == pytest.approx(math.log(5) / math.log(20))
    # 2 to 0 over the four steps
    assert mean_beta(annealed.runs[0]) == pytest.approx((2 + 4 / 3 + 2 / 3 + 0) / 4)
    assert ends.share_of(annealed) == pytest.approx(math.log(10) / math.log(20))


def test_from_a_beta_of_0_the_rule_is_linear_in_beta(here: Path, tmp_path: Path) -> None:
    ends = find_ends(copy(Path("low"), tmp_path / "none", beta=0.0), Path("high"), [Path("middle")])
    assert ends.share_of(ends.trained[0]) == pytest.approx(0.25)


# What a mixture predicts


def gaps(*given: tuple[float, float, float]) -> Gaps:
    names = ("preference_accuracy", "exact_match")
    return Gaps(0.5, {name: Interval(*ends) for name, ends in zip(names, given, strict=False)})


@pytest.mark.parametrize(
    ("given", "outcome", "is_near"),
    [
        ([(0.01, -0.02, 0.029), (0.0, -0.01, 0.01)], "predicted", True),
        # Shown to differ, but by less than the margin
        ([(0.02, 0.01, 0.029), (0.0, -0.01, 0.01)], "predicted", True),
        ([(0.01, -0.02, 0.031), (0.0, -0.01, 0.01)], "open", True),
        ([(0.02, 0.01, 0.031), (0.0, -0.01, 0.01)], "open", True),
        ([(0.0, -0.01, 0.01), (-0.04, -0.09, 0.01)], "open", False),
        ([(0.0, -0.01, 0.01), (-0.04, -0.06, -0.02)], "missed", False),
        ([(0.01, math.nan, math.nan), (0.0, math.nan, math.nan)], "open", True),
        ([(0.3, math.nan, math.nan), (0.0, math.nan, math.nan)], "open", False),
    ],
)
def test_a_prediction_holds_if_all_figures_are_shown_to_be_the_same(
    given: list[tuple[float, float, float]], outcome: str, is_near: bool
) -> None:
    assert gaps(*given).outcome == outcome
    assert gaps(*given).is_near == is_near


def evaluation(num_preferred: int, num_right: int, num: int = 100) -> Evaluation:
    """Return an evaluation of pairs with given numbers of preferred pairs and right answers."""
    preferred = torch.arange(num) < num_preferred
    scores = Scores(preferred.float() - 2, torch.full((num,), -1.5), torch.ones(num))
    answers = [Generation("", "", "", 1, 0.0, at < num_right) for at in range(num)]
    return Evaluation({}, scores, answers, 0.0)


@pytest.fixture
def front(here: Path) -> Callable[..., Front]:
    """Return the front of mixtures with given numbers of preferred pairs and right answers.

    The middle of three seeds is trained to 90 of both.
    """
    low, high, middle = (read_run(Path(name)) for name in ("low", "high", "middle"))

    def setting(run: Any, found: Evaluation | None = None) -> Setting:
        seeds = [replace(run, values=run.values | {"seed": seed}) for seed in range(3)]
        if found is not None:
            seeds = [replace(seed, scores=scores_of(found)) for seed in seeds]
        return Setting(run.folder.name, run.values, seeds)

    def scores_of(found: Evaluation) -> dict[str, Any]:
        return {name: np.array(column, dtype=float) for name, column in found.by_pair().items()}

    def make(*points: tuple[int, int]) -> Front:
        trained = setting(middle, evaluation(3600, 3600, 4000))
        ends = Ends(setting(low), setting(high), [trained], [])
        shares = sorted({0.0, 0.2, 1.0, ends.share_of(trained)})
        found = [evaluation(*point, 4000) for point in points]
        return Front(ends, shares, dict.fromkeys(range(3), found))

    return make


def test_the_mixture_of_the_rule_and_the_nearest_one_are_told_apart(
    front: Callable[..., Front],
) -> None:
    (trained,) = front((3200, 3920), (3604, 3596), (3800, 3200), (3960, 2000)).trained
    assert trained.by_rule.share == pytest.approx(math.log(5) / math.log(20))
    assert trained.by_rule.outcome == "missed"
    assert (trained.nearest.share, trained.nearest.outcome) == (0.2, "predicted")


@pytest.mark.parametrize(
    ("points", "best"),
    [
        # 2 points less quality than the best are within the margin, 4 points are not
        ([(3200, 3920), (3600, 3840), (3800, 3760), (3960, 2000)], 0.2),
        ([(3200, 3920), (3600, 3840), (3800, 3820), (3960, 3800)], 1.0),
        ([(3600, 3920), (3600, 3920), (3600, 3920), (3960, 2000)], 0.0),
        ([(3600, 2000), (3640, 3920), (3600, 3920), (3960, 2000)], 0.2),
    ],
)
def test_the_best_mixture_has_the_highest_accuracy_among_those_of_good_quality(
    front: Callable[..., Front], points: list[tuple[int, int]], best: float
) -> None:
    assert front(*points).best == best


def test_an_end_that_comes_to_other_figures_than_its_run_is_named(here: Path) -> None:
    ends = find_ends(Path("low"), Path("high"), [])
    (low, high), *_ = ends.by_seed.values()
    assert low.summary is not None
    assert high.summary is not None
    own, other = low.summary["after"], dict(high.summary["after"])
    other["chosen_nll"] += 0.5
    found = [replace(evaluation(50, 50), metrics=metrics) for metrics in (own, other)]
    (line,) = Front(ends, [0.0, 1.0], {42: found}).unlike
    assert line.startswith("high came to other figures here")
    assert line.endswith("0.5 in chosen_nll")


# The command


def test_the_command_shows_what_is_predicted_and_exports_a_mixture(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ["--trained", "middle", "low-2", "high-2", "faster", "--points", "2"]
    target = ["--out", str(tmp_path / "out"), "--export", str(tmp_path / "mixture")]
    main(["dial", "low", "high", *others, *target, "--share", "0.4"])
    said = capsys.readouterr().out
    assert "left out: faster differs in optimizer.learning_rate" in said
    assert "Shares 0 and 1 come to exactly the figures of summary.json (4 runs)." in said
    assert "Settings trained between the two: 1." in said
    report = json.loads((tmp_path / "out" / "dial.json").read_text())
    shares = [mixture["share"] for mixture in report["mixtures"]]
    assert shares == pytest.approx([0, 0.4, math.log(5) / math.log(20), 1])
    assert (report["seeds"], report["unlike"]) == ([42, 2], [])
    assert report["trained"][0]["by_rule"]["outcome"] == "open", "one seed has been trained"
    text = (tmp_path / "out" / "dial.md").read_text()
    assert "| 0.4 " in text
    assert text.count("chosen") >= 1
    assert (tmp_path / "out" / "dial.png").read_bytes().startswith(b"\x89PNG")
    assert "0.6 of the change that low made" in (tmp_path / "mixture" / "README.md").read_text()
    assert RunFolder(tmp_path / "mixture").file("adapter_model.safetensors").exists()


@pytest.mark.slow
def test_adapters_on_an_earlier_runs_result_are_mixed_on_this_result(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    shutil.copytree(here / "low", "first")
    for name, beta in (("low", LOW), ("high", HIGH)):
        # The adapter of the first run is merged into the base, which lies in final/base then
        start(*RUN, beta, "start_from=first", "optimizer.r=4", f"hydra.run.dir={name}")
    dial = Dial(Path("low"), Path("high"))
    found = dial.measure([0.0, 1.0])
    for name, evaluated in zip(("low", "high"), found, strict=True):
        assert evaluated.metrics == json.loads(Path(name, "summary.json").read_text())["after"]
    dial.save(0.5, tmp_path / "mixture", "")
    for name in ("first", "low", "high"):
        shutil.rmtree(name)
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(saved), logits(dial.network))
