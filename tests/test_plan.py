"""A plan's figures are those that hooks count on a real model, and its words lead somewhere."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import plan as counted
from benchmarks import plan_tables
from orpo_lab import config
from orpo_lab.__main__ import main
from orpo_lab.errors import UserError
from orpo_lab.plan import cards, check, lengths, memory, placing, planned, sweep
from tests.conftest import ROOT

Load = Callable[..., config.Config]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(each, id="-".join(each), marks=[] if i in counted.QUICK else pytest.mark.slow)
        for i, each in enumerate(counted.CONFIGURATIONS)
    ],
)
def test_the_plan_is_what_hooks_count(overrides: tuple[str, ...], load: Load) -> None:
    rows = counted.compare(load("tracker=none", *overrides), counted.TINY)
    assert set(rows) == {"weights", "gradients", "states", "saved"}
    for part, (planned_bytes, counted_bytes) in rows.items():
        assert planned_bytes == counted_bytes > 0, part


def of(
    loaded: config.Config, card: cards.Card, own: Any = None, processes: int = 1
) -> planned.Plan:
    sizes = lengths.Lengths([(20, 30, 30)], 600, 40, "given")
    return planned.plan(loaded, own or counted.own_config(loaded), card, sizes, processes)


CARD = "memory_gb=24,tflops=100,bandwidth_gbps=1000"


def test_a_run_fits_until_its_memory_is_missing_and_checkpointing_comes_before(
    load: Load,
) -> None:
    plan = of(load(), cards.named(CARD))
    assert plan.fits
    assert not plan.checkpointing
    assert plan.largest_budget > plan.tokens
    least = plan.memory.needed / cards.GIB / cards.USABLE
    tight = cards.named(f"memory_gb={least * 0.99},tflops=100,bandwidth_gbps=1000")
    assert of(load(), tight).checkpointing
    none = cards.named("memory_gb=0.0001,tflops=100,bandwidth_gbps=1000")
    refused = of(load(), none)
    assert not refused.fits
    assert refused.largest_budget == 0


def test_a_faster_card_takes_less_time_and_more_steps_take_more(load: Load) -> None:
    slow, fast = (
        cards.named(f"memory_gb=24,tflops={rate},bandwidth_gbps=1000,host_ms_per_layer=0.0001")
        for rate in (0.01, 0.02)
    )
    plans = [of(load(), card).seconds for card in (slow, fast)]
    assert plans[0].steps == pytest.approx(2 * plans[1].steps, rel=0.1)
    longer = of(load("train.max_steps=240"), slow).seconds
    assert longer.steps == pytest.approx(2 * plans[0].steps)


def test_a_step_of_all_weights_has_a_share_of_its_own_where_one_is_measured(load: Load) -> None:
    numbers = "memory_gb=24,tflops=0.01,bandwidth_gbps=1000,host_ms_per_layer=0.0001,share=0.4"
    both, full = (cards.named(f"{numbers}{more}") for more in ("", ",share_full=0.8"))
    for optimizer, times in (("lora", 1), ("adamw", 2)):
        slow, fast = (
            of(load(f"optimizer={optimizer}"), card).seconds.steps for card in (both, full)
        )
        assert slow == pytest.approx(times * fast, rel=0.01)


@pytest.mark.slow
def test_a_calibration_measures_this_machine_and_plans_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "card.yaml"
    main(["plan", "--calibrate", "--calibration", str(file)])
    card = cards.this_machine(file)
    assert card.calibrated
    assert card.share_full is not None
    # Beside its matrix products a step of adapters has more to compute than a step of all weights
    assert 0 < card.share < card.share_full
    assert card.host_ms_per_layer > 0
    capsys.readouterr()
    main(["plan", "--calibration", str(file)])
    assert f"calibrated {card.calibrated}" in capsys.readouterr().out


def test_a_reference_and_mismatched_completions_have_their_time(load: Load) -> None:
    """A reference is one forward pass over all pairs whose loss is computed, for KTO two passes."""
    card = cards.named("memory_gb=24,tflops=0.01,bandwidth_gbps=1000,host_ms_per_layer=0.0001")
    orpo, dpo, kto = (
        of(load(f"method={method}"), card).seconds for method in ("orpo", "dpo", "kto")
    )
    with_loss = of(load("method=dpo", "train.eval_steps=60"), card).seconds
    assert orpo.reference == 0 < dpo.reference
    a_pair = dpo.reference / 600
    assert with_loss.reference == pytest.approx(a_pair * (600 + 40))
    assert with_loss.evaluation == pytest.approx(2 * 40 * a_pair)
    assert kto.reference == pytest.approx(2 * dpo.reference)
    batch = load().train.batch_size
    assert kto.steps - dpo.steps == pytest.approx(120 * batch * a_pair)
    kto_loss = of(load("method=kto", "train.eval_steps=60"), card).seconds
    assert kto_loss.evaluation == pytest.approx(2 * with_loss.evaluation), "mismatched pairs too"
    halves = of(load("method=dpo"), card, processes=2).seconds
    assert halves.reference == pytest.approx(dpo.reference / 2)


def test_the_evaluation_of_a_plan_does_not_depend_on_the_loss(load: Load) -> None:
    """Both completions are scored, and the prompt is not, whatever the method reads."""
    card = cards.named("memory_gb=24,tflops=0.01,bandwidth_gbps=1000,host_ms_per_layer=0.0001")
    given = [of(load(f"method={method}"), card).seconds for method in ("orpo", "dpo", "sft")]
    assert given[0].before == pytest.approx(given[1].before) == pytest.approx(given[2].before)
    assert given[2].steps < given[1].steps


def test_single_completions_count_as_the_pairs_that_a_method_reads(
    load: Load, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n % 4} + 2 =", "completion": f" {n}", "label": n < 4} for n in range(12)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "9 + 2 =", "chosen": " 11", "rejected": " 12"}) + "\n")
    given = [
        "dataset=unpaired",
        f"dataset.train_path={file}",
        f"dataset.eval_path={held}",
        "dataset.as_messages=false",
        "train.max_steps=null",
        "train.num_epochs=1",
        "train.batch_size=1",
        "dataset.num_train=null",
        "dataset.num_eval=1",
    ]
    steps = {}
    for method in ("kto", "dpo", "sft"):
        loaded = load(f"method={method}", *given)
        own = counted.own_config(loaded)
        found = lengths.of(loaded, own)
        assert found.source.startswith("measured"), found.source
        steps[method] = planned.plan(loaded, own, cards.named(CARD), found).num_steps
    assert steps == {"kto": 12, "dpo": 4, "sft": 4}


def test_a_reference_of_an_unknown_number_of_pairs_is_refused(load: Load) -> None:
    unknown = lengths.Lengths([(20, 30, 30)], None, 40, "given")
    own = counted.own_config(load())
    asked = "train.max_steps=10"
    assert planned.plan(load(asked), own, cards.named(CARD), unknown).num_steps == 10
    with pytest.raises(UserError, match=r"reference needs the number .*pairs=N or dataset.num_tr"):
        planned.plan(load(asked, "method=dpo"), own, cards.named(CARD), unknown)


def test_checkpointing_costs_a_forward_pass(load: Load) -> None:
    card = cards.named("memory_gb=24,tflops=0.01,bandwidth_gbps=1000,host_ms_per_layer=0.0001")
    without, with_ = (
        of(load(f"train.gradient_checkpointing={how}"), card).seconds.steps
        for how in ("false", "true")
    )
    assert 1.2 < with_ / without < 1.5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("b200", "h100"),
        ("memory_gb=24,tflops=x,bandwidth_gbps=1", "float"),
        ("memory_gb=24,tflops=3", "bandwidth_gbps"),
        ("memory_gb=24,tflops=0,bandwidth_gbps=1", "above 0"),
    ],
)
def test_a_card_that_is_not_known_is_refused(given: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cards.named(given)


def test_every_card_has_its_numbers_and_a_calibration_has_a_day() -> None:
    for name in cards.names():
        card = cards.named(name)
        assert card.memory > 10e9
        narrow, wide = (
            card.rate(dtype, trains_all=False) for dtype in (torch.bfloat16, torch.float32)
        )
        assert narrow > wide
    assert cards.named("h200").calibrated == "2026-11-26"
    assert cards.named("t4").dtype("bf16") == torch.float16
    assert not cards.named("h100").calibrated


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("prompt=10,chosen=5", "rejected"),
        ("prompt=10,chosen=5,rejected=x", "invalid"),
        ("prompt=10,chosen=5,rejected=999", "max_length"),
    ],
)
def test_lengths_that_no_pair_can_have_are_refused(given: str, says: str, load: Load) -> None:
    with pytest.raises(UserError, match=says):
        lengths.given(given, load())


def test_a_sweep_trains_what_its_jobs_share_once(load: Load) -> None:
    jobs = [
        load(f"beta_schedule={schedule}", f"seed={seed}")
        for schedule in ("constant", "hold_then_anneal")
        for seed in (1, 2)
    ]
    plans = {sweep.key_of(job): of(job, cards.named(CARD)) for job in jobs}
    total = sweep.total([*jobs, jobs[0]], plans)
    assert total.jobs == 4
    assert total.befores == 1
    assert total.steps + total.shared == 4 * 120
    assert total.shared > 0
    alone = sweep.total(jobs[:1], plans)
    assert alone.seconds == pytest.approx(plans[sweep.key_of(jobs[0])].seconds.total)


def test_of_jobs_that_come_to_one_run_the_first_is_planned(load: Load) -> None:
    jobs = [load("method=dpo", f"train.eval_steps={steps}") for steps in (30, "null")]
    plans = {sweep.key_of(job): of(job, cards.named(CARD)) for job in jobs}
    seconds = [sweep.total(some, plans).seconds for some in (jobs, jobs[:1], jobs[::-1], jobs[1:])]
    assert seconds[0] == seconds[1] > seconds[2] == seconds[3]


def test_jobs_of_a_sweep_share_their_reference_by_what_it_holds(load: Load) -> None:
    jobs = [load(f"method={method}") for method in ("dpo", "ipo", "kto", "orpo")]
    plans = {sweep.key_of(job): of(job, cards.named(CARD)) for job in jobs}
    total = sweep.total(jobs, plans)
    assert total.references == 2
    seconds = [plans[sweep.key_of(job)].seconds for job in jobs]
    alone = sum(each.total - each.steps for each in seconds)
    saved = 3 * seconds[0].before + seconds[1].reference
    assert total.seconds_of_others == pytest.approx(alone - saved)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Any:
    columns = {"prompt_ids": [[1] * 9], "chosen_ids": [[1] * 9], "rejected_ids": [[1] * 9]}
    return SimpleNamespace(train=columns | {}, held_out=[0])


def test_a_run_that_cannot_fit_is_warned_of_or_refused_with_its_keys(
    load: Load, pairs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = cards.named("memory_gb=0.0001,tflops=1,bandwidth_gbps=1")
    monkeypatch.setattr(cards, "this_machine", lambda: tiny)
    loaded = load("train.batch_size=1")
    own = counted.own_config(loaded)
    assert check.before_loading(loaded, own, pairs, 1) is not None
    assert "dataset.max_length below" in caplog.text
    with pytest.raises(UserError, match=r"dataset\.max_length below.*plan\.check=warn"):
        check.before_loading(load("train.batch_size=1", "plan.check=refuse"), own, pairs, 1)
    assert check.before_loading(load("plan.check=off"), own, pairs, 1) is None


def test_a_budget_of_hours_below_the_plan_is_said(
    load: Load, pairs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("train.batch_size=1", "train.max_hours=0.000001")
    own = counted.own_config(loaded)
    assert check.before_loading(loaded, own, pairs, 1) is None, "a CPU has no plan unasked"
    card = cards.named(CARD)
    monkeypatch.setattr(cards, "this_machine", lambda: card)
    check.before_loading(loaded, own, pairs, 1)
    assert "train.max_hours=1e-06 is below" in caplog.text


def test_a_plan_that_cannot_be_made_ends_no_run(load: Load, pairs: Any) -> None:
    assert check.before_loading(load("plan.check=refuse"), None, pairs, 1) is None


def test_the_command_prints_parts_verdict_and_remedies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = "memory_gb=0.01,tflops=1,bandwidth_gbps=1"
    lengths_of = ["--lengths", "prompt=40,chosen=50,rejected=50"]
    main(["plan", "train.gradient_checkpointing=false", "--card", small, *lengths_of])
    said = capsys.readouterr().out
    for words in ("activations", "evaluate before", "does not fit", "train.gradient_checkpointing"):
        assert words in said
    main(["plan", "--card", "h100", "--json", *lengths_of])
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"]
    assert figures["bytes"]["frozen"] > 0
    assert figures["seconds"]["total"] > 0


@pytest.mark.parametrize(
    ("device", "memory_gb", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100_40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100_80"),
        ("NVIDIA A100 80GB PCIe", None, "a100_80"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA L40S", 44.4, None),
        ("NVIDIA A10G", None, None),
        ("T4", None, "t4"),
        ("A100", None, "a100_40"),
        ("A100-80G", None, "a100_80"),
        ("GeForce-RTX-3090", None, "rtx3090"),
    ],
)
def test_a_device_is_the_card_of_its_name(
    device: str, memory_gb: float | None, name: str | None
) -> None:
    assert cards.like(device, memory_gb) == name


def test_jobs_are_placed_where_they_fit_and_end_first(load: Load) -> None:
    same = ("optimizer=adamw", "train.batch_size=200", "train.gradient_checkpointing=false")
    small, large = (load(*same, f"engine.tokens_per_microbatch={n}") for n in (256, 16384))
    gpus = {"T4": 4.0, "H100": 1.0, "A10G": 9.0}
    # On its own a job ends first on the H100. Behind many others it does not
    assert placing.choose([small], gpus, 1) == ["H100"]
    many = placing.choose([small] * 20, gpus, 1)
    assert set(many) == {"T4", "H100"}
    # A job's share of a T4 is too little for the large job
    assert placing.choose([large] * 20, gpus, 20) == ["H100"] * 20
    with pytest.raises(UserError, match=r"job 2 needs .* share of H100 has"):
        placing.choose([small, large], gpus, 100)
    with pytest.raises(UserError, match=r"GPUs \(A10G\) no figures are known"):
        placing.choose([small], {"A10G": 1.0}, 1)


def test_processes_share_time_and_with_sharding_memory(load: Load) -> None:
    one, two = (
        of(load("optimizer=adamw", "train.sharding=full"), cards.named("h100"), processes=num)
        for num in (1, 2)
    )
    for part in ("trained", "gradients", "moments"):
        shared = getattr(two.memory, part)
        assert shared == pytest.approx(getattr(one.memory, part) / 2, abs=1), part
    assert two.memory.working > one.memory.working
    assert two.figures()["processes"] == 2
    whole = of(load("optimizer=adamw"), cards.named("h100"), processes=2)
    assert whole.memory.states == one.memory.states
    link = f"{CARD},host_ms_per_layer=0.0001,link_gbps="
    # An answer's tokens take as long in one process as in two
    loaded = load("dataset.num_generations=0")
    slow, fast = (of(loaded, cards.named(f"{link}{gb}"), processes=2) for gb in ("0.001", "1000"))
    alone = of(loaded, cards.named(f"{link}1000"))
    assert fast.seconds.steps == pytest.approx(alone.seconds.steps / 2, rel=0.05)
    assert fast.seconds.before == pytest.approx(alone.seconds.before / 2, rel=0.05)
    # Half of twice the adapters' gradients, in every step
    sent = alone.num_steps * alone.memory.gradients / 0.001e9
    assert slow.seconds.steps - fast.seconds.steps == pytest.approx(sent, rel=0.01)
    with pytest.raises(UserError, match="below the 32 processes"):
        of(load(), cards.named("h100"), processes=32)


def test_processes_on_a_cpu_share_its_memory(load: Load) -> None:
    here = replace(cards.this_machine(), memory_gb=8)
    assert of(load(), here, processes=4).card.memory == here.memory // 4


def test_a_peak_is_that_of_the_largest_phase() -> None:
    one = memory.Memory(
        frozen=1,
        trained=1,
        gradients=1,
        moments=1,
        bases=1,
        updates=1,
        activations=1,
        head=memory.Head(1, 1, 1),
        working=2,
        evaluation=1,
    )
    assert one.phases == {"backward": 10, "update": 6, "evaluation": 5}
    updated, evaluated = replace(one, updates=100), replace(one, evaluation=100)
    assert updated.peak == updated.phases["update"] == 105
    assert evaluated.peak == evaluated.phases["evaluation"] == 104
    assert replace(one, head=memory.Head(1, 1, 50)).peak == one.peak - 2 + 50


@pytest.mark.slow
@pytest.mark.long
def test_the_tables_of_the_docs_are_those_of_the_command() -> None:
    said = (ROOT / "docs" / "hardware.md").read_text()
    assert all(line in said for line in plan_tables.tables())
