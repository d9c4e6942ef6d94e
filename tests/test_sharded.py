"""Weights that several processes share: what is refused, what is kept, and what is trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from benchmarks import processes as bench
from benchmarks.plan import own_config
from orpo_lab import api
from orpo_lab.errors import UserError
from orpo_lab.plan import cards, lengths, planned
from orpo_lab.records.results import round_weights
from orpo_lab.training import sharded
from orpo_lab.training.parts import is_sharded, local, whole

FULL = "train.sharding=full"
CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of processes that has one process alone."""
    file = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer=galore", "use train.sharding=none, or optimizer=lora, qlora or adamw"),
        ("quantization=int8", "use quantization=nf4"),
        ("engine=trl", "use engine=shared_prefix"),
        ("train.meter_steps=2", "set it to null"),
        ("evaluation=harness", "use evaluation=none"),
    ],
)
def test_what_cannot_share_weights_is_refused(load: Any, override: str, said: str) -> None:
    with pytest.raises(UserError, match=f"train.sharding=full cannot.*{said}"):
        load(FULL, override)


def trained(network: Any) -> torch.optim.Optimizer:
    """Take a step, and return the optimizer."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for weight in network.parameters():
        weight.grad = 0.1 * weight.detach()
    optimizer.step()
    return optimizer


@pytest.mark.usefixtures("group")
def test_parts_are_read_by_a_model_that_is_not_sharded(
    load: Any, build_model: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=adamw")
    shared, plain = build_model(loaded), build_model(loaded)
    sharded.shard(shared, CPU)
    assert is_sharded(shared)
    assert not is_sharded(plain)
    theirs, ours = trained(shared), torch.optim.AdamW(plain.parameters())
    sharded.save(shared, theirs, tmp_path / "parts")
    sharded.load(plain, tmp_path / "parts", ours)
    names = dict(plain.named_parameters())
    assert names
    for name, weight in shared.named_parameters():
        assert torch.equal(whole(weight), names[name])
        for key, moment in theirs.state[weight].items():
            assert torch.equal(whole(moment), ours.state[names[name]][key]), (name, key)
    saved = sharded.whole_model(shared)
    assert all(torch.equal(weight, names[name]) for name, weight in saved.named_parameters())
    assert type(saved) is type(plain)


@pytest.mark.usefixtures("group")
def test_parts_of_another_model_are_refused(load: Any, build_model: Any, tmp_path: Path) -> None:
    loaded = load("optimizer=adamw")
    shared, other = build_model(loaded), torch.nn.Linear(2, 3)
    sharded.shard(shared, CPU)
    sharded.save(shared, trained(shared), tmp_path / "parts")
    with pytest.raises(UserError, match="is not of this model"):
        sharded.load(other, tmp_path / "parts")


@pytest.mark.usefixtures("group")
def test_a_process_takes_its_part_of_a_whole_tensor(load: Any, build_model: Any) -> None:
    shared = build_model(load("optimizer=adamw"))
    sharded.shard(shared, CPU)
    weight = next(shared.parameters())
    given = torch.randn(weight.shape)
    part = sharded.part_like(given, weight)
    assert type(part) is type(weight.data)
    assert torch.equal(local(part), given)
    assert sharded.part_like(3, weight) == 3
    assert sharded.part_like(given, given) is given


def test_the_model_that_is_measured_is_the_model_that_is_saved() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    round_weights(layer, torch.bfloat16)
    rounded = layer.weight.detach().clone()
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    # At random, and not to the nearest number: a small change is kept on average
    assert not torch.equal(rounded, before.bfloat16().float())
    round_weights(layer, torch.bfloat16)
    assert torch.equal(layer.weight, rounded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        pytest.param("lora", marks=pytest.mark.long),
        pytest.param("qlora", marks=pytest.mark.long),
    ],
)
def test_processes_that_share_the_weights_train_what_one_trains(tmp_path: Path, name: str) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    bench.run(one, 1, *bench.RUNS[name])
    # More micro-batches in one process than in the other
    bench.run(two, 2, *bench.RUNS[name], FULL, "engine.tokens_per_microbatch=1024")
    assert bench.difference(one, two) < 1e-5
    said = next(
        line for line in (two / "run.log").read_text().splitlines() if "fully sharded" in line
    )
    _, ours, _, of_all, *_ = said[said.index("sharded:") :].split()
    adapters = sum(4 * weight.numel() for weight in bench.weights(one).values()) / 1e6
    kept_whole = 0.0 if name == "adamw" else adapters
    assert float(ours) == pytest.approx(kept_whole + (float(of_all) - kept_whole) / 2, abs=0.11)
    loaded = api.compose(*bench.RUNS[name], FULL, "model.dtype=fp32").config
    sizes = lengths.Lengths([(20, 30, 30)], 256, 32, "given")
    plan = planned.plan(loaded, own_config(loaded), cards.this_machine(), sizes, processes=2)
    # torch counts no constants of 4-bit weights among the parameters
    constants = 0.05 if name == "qlora" else 0.0
    held = (plan.memory.frozen + plan.memory.trained) / 1e6
    assert float(ours) == pytest.approx(held - constants, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.long)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, before: int, after: int
) -> None:
    same = ("optimizer=adamw", "train.lr_scheduler_type=constant", FULL)
    place = tmp_path / "run"
    bench.run(place, before, *same, "train.max_steps=5", "train.save_steps=5")
    has_parts = (place / "checkpoints/checkpoint-5" / sharded.PARTS).is_dir()
    assert has_parts == (before == 2)
    bench.run(place, after, *same, "train.max_steps=10", "resume=auto", "accept_changes=true")
    bench.run(tmp_path / "whole", 1, *same)
    assert bench.difference(tmp_path / "whole", place) < 1e-5
