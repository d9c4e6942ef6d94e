"""The meter of preference: two separate backward passes, which leave the step as it is."""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab import config, engine, optimizer
from orpo_lab.errors import NonFiniteError, UserError
from orpo_lab.methods.base import LIKELIHOOD, PREFERENCE
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.training import checkpoint
from orpo_lab.training.checkpoint import Checkpoint, Made, Spent
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.preference import PreferenceMeter, figures, split
from orpo_lab.training.state import RandomState, State
from tests.test_trainer import SMALL, fit, poison

Load = Callable[..., config.Config]
LAYERWISE = "optimizer=galore optimizer.layerwise=true optimizer.update_proj_gap=2"
DROPOUT = "optimizer=lora optimizer.dropout=0.1"
CPU = torch.device("cpu")


def make_pairs(num: int) -> list[dict[str, list[int]]]:
    numbers = random.Random(0)

    def ids(least: int) -> list[int]:
        return [numbers.randrange(3, 90) for _ in range(numbers.randint(least, least + 9))]

    return [
        {"prompt_ids": ids(20), "chosen_ids": ids(8), "rejected_ids": ids(12)} for _ in range(num)
    ]


def terms_by_equations(method: str, model: Any, pairs: Sequence[Any], beta: float) -> list[Tensor]:
    """Return both terms of a step, from one sequence after another."""
    sums, preferences, num_tokens = [], [], 0
    for pair in pairs:
        prompt, logps = pair["prompt_ids"], []
        for side in ("chosen_ids", "rejected_ids"):
            sequence = torch.tensor([prompt + pair[side]])
            every = model(input_ids=sequence).logits[0, :-1].log_softmax(-1)
            logps.append(every.gather(1, sequence[0, 1:, None])[:, 0])
        chosen, rejected = (of_side[len(prompt) - 1 :] for of_side in logps)
        if method == "cpo":
            learned = chosen
            preferences.append(-logsigmoid(beta * (chosen.sum() - rejected.sum())))
        else:
            learned = logps[0]
            p, q = chosen.mean().exp(), rejected.mean().exp()
            log_odds = (p / (1 - p)).log() - (q / (1 - q)).log()
            preferences.append(-beta * logsigmoid(log_odds))
        sums.append(learned.sum())
        num_tokens += len(learned)
    return [-torch.stack(sums).sum() / num_tokens, torch.stack(preferences).mean()]


def make_state(loaded: config.Config, network: Any) -> State:
    updater = optimizer.build(loaded, network, num_steps=9, dtype=torch.float32)
    return State(network, updater, OneDevice(CPU, torch.float32), lambda _: 1.0)


@pytest.mark.parametrize(
    ("method", "beta", "overrides"),
    [
        ("orpo", 0.3, "optimizer=lora optimizer.dropout=0"),
        ("orpo", 0.3, LAYERWISE),
        ("cpo", 0.01, "optimizer=adamw"),
    ],
)
def test_the_meter_is_two_separate_backward_passes_of_the_equations(
    load: Load, build_model: Any, tokenizer: Any, method: str, beta: float, overrides: str
) -> None:
    pairs = make_pairs(6)
    loaded = load(f"method={method}", *overrides.split(), "engine.tokens_per_microbatch=200")
    network = build_model(loaded)
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.1)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    vectors = []
    for term in terms_by_equations(method, network, pairs, beta):
        gradients = torch.autograd.grad(term, trained, retain_graph=True)
        vectors.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    likelihood, theirs = vectors
    expected = {
        "meter/likelihood_norm": likelihood.norm().item(),
        "meter/preference_norm": theirs.norm().item(),
        "meter/preference_share": (theirs.norm() / (likelihood.norm() + theirs.norm())).item(),
        "meter/cosine": torch.cosine_similarity(likelihood, theirs, dim=0).item(),
    }

    state = make_state(loaded, network)
    built = engine.build(loaded, model=network, tokenizer=tokenizer, devices=state.devices)
    assert len(built.micro_batches(pairs)) > 1
    for num_parts in (1, 3):
        meter = PreferenceMeter(1, num_parts)
        found = meter.measure(built, state, pairs, beta, RandomState.now())
        assert found == pytest.approx(expected, rel=1e-5), num_parts
    assert all(weight.grad is None for weight in trained)
    assert not isinstance(state.updater.optimizer, GaLore) or not any(
        gradient.any() for gradient in state.updater.gradients()
    )


def count_passes(network: Any) -> dict[str, int]:
    """Count the forward and the backward passes of training from now on."""
    passes = {"forward": 0, "backward": 0}

    def count(module: Any, args: Any, output: Tensor) -> None:
        if module.training:
            passes["forward"] += 1
            output.register_hook(lambda _: passes.update(backward=passes["backward"] + 1))

    last_norm = [module for name, module in network.named_modules() if name.endswith("norm")][-1]
    last_norm.register_forward_hook(count)
    return passes


@pytest.mark.parametrize("overrides", [DROPOUT, LAYERWISE])
def test_a_measured_run_is_bit_for_bit_one_without_a_meter(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path, overrides: str
) -> None:
    common = (*overrides.split(), *SMALL, "train.max_steps=4", "train.logging_steps=1", "beta=0.5")
    weights, lines, passes = [], [], []
    for number, length in enumerate(("null", "2")):
        loaded = load(*common, f"train.meter_steps={length}")
        network = build_model(loaded)
        passes.append(count_passes(network))
        _, place = fit(loaded, network, tokenizer, tmp_path / str(number))
        weights.append(network.state_dict())
        lines.append(place.metrics())
    plain, measured = weights
    assert all(torch.equal(measured[name], weight) for name, weight in plain.items())
    assert passes == [{"forward": 4, "backward": 4}, {"forward": 8, "backward": 8}]
    of_meter = [line for line in lines[1] if "meter/cosine" in line]
    assert [line for line in lines[1] if line not in of_meter] == lines[0]
    assert [line["step"] for line in of_meter] == [2, 4]
    if overrides == DROPOUT:  # the norm of layer-wise GaLore is of projected gradients
        for line in of_meter:
            a, b = line["meter/likelihood_norm"], line["meter/preference_norm"]
            (step,) = (other for other in lines[0] if other["step"] == line["step"])
            total = (a**2 + b**2 + 2 * a * b * line["meter/cosine"]) ** 0.5
            assert step["grad_norm"] == pytest.approx(total, rel=1e-5), "of the same dropout"


def test_a_resumed_run_measures_the_same(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    lengths = ("train.max_steps=5", "train.save_steps=2", "train.meter_steps=2")
    loaded = load(*DROPOUT.split(), *SMALL, *lengths, "train.num_checkpoints=3")
    whole, resumed = build_model(loaded), build_model(loaded)
    _, first = fit(loaded, whole, tokenizer, tmp_path / "whole")
    path = checkpoint.folders(first)[0]
    start = Checkpoint(path, Made("", "", ""), Spent(), {})
    _, second = fit(loaded, resumed, tokenizer, tmp_path / "resumed", start)
    assert [line for line in first.metrics() if line["step"] > 2] == second.metrics()
    assert sum("meter/cosine" in line for line in second.metrics()) == 1
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_number_that_is_not_finite_still_stops_a_measured_run(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = load("optimizer=lora", *SMALL, "train.max_steps=5", "train.meter_steps=1")
    network = build_model(loaded)
    poison("loss", network, num_fine=4)  # passes: one of step 1, three of step 2
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        fit(loaded, network, tokenizer, tmp_path)
    assert [line["step"] for line in RunFolder(tmp_path).metrics()] == [1, 2]


def test_the_loss_scale_of_fp16_keeps_small_gradients_and_is_not_in_them() -> None:
    weight, other = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    loss = (weight.half().float() * 1e-9).sum()
    assert torch.autograd.grad(loss, weight, retain_graph=True)[0].tolist() == [0, 0]
    gradient, none = OneDevice(CPU, torch.float16).gradients(loss, [weight, other])
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([1e-9] * 2, rel=1e-2)
    assert none is None
    assert weight.grad is None


def run_out(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory run out for gradients of more weights at once; return the numbers asked for."""
    asked: list[int] = []
    gradients = OneDevice.gradients

    def limited(devices: OneDevice, loss: Tensor, weights: Sequence[Tensor]) -> Any:
        asked.append(len(weights))
        if len(weights) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(devices, loss, weights)

    monkeypatch.setattr(OneDevice, "gradients", limited)
    return asked


def test_where_memory_runs_out_weights_are_measured_in_parts_or_not_at_all(
    load: Load,
    build_model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("orpo_lab").propagate = True
    loaded = load(*DROPOUT.split())
    network, pairs = build_model(loaded), make_pairs(2)
    state = make_state(loaded, network)
    built = engine.build(loaded, model=network, tokenizer=tokenizer, devices=state.devices)
    begun, num = RandomState.now(), len(state.updater.optimizer.param_groups[0]["params"])
    found = []
    for limit in (num, num // 2, 0):
        meter = PreferenceMeter(2)
        with monkeypatch.context() as patched:
            asked = run_out(limit, patched)
            found += [meter.measure(built, state, pairs, 0.3, begun) for _ in range(2)]
        assert torch.equal(RandomState.now().cpu, begun.cpu)
        warned = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (limit == 0)
    assert found[0].keys() >= {"meter/preference_share", "meter/cosine"}
    assert found[1:4] == [pytest.approx(found[0], rel=1e-9)] * 3
    assert found[4:] == [{}, {}]
    assert asked == sorted(asked, reverse=True), "and not tried again"
    assert len(asked) == 5, "whole, and in 2, 4, 8 and 16 parts"
    assert not meter.is_due(4)
    assert "step 1: out of memory in the meter of preference" in caplog.text


def test_parts_are_in_order_and_of_about_equal_size() -> None:
    weights = [torch.ones(size) for size in (4, 1, 1, 2, 8)]
    sizes = [[len(weight) for weight in part] for part in split(weights, 2)]
    assert sizes == [[4, 1, 1, 2], [8]]
    assert split(weights, 1) == [weights]
    assert [weight for part in split(weights, 3) for weight in part] == weights


def test_a_figure_that_does_not_exist_is_left_out() -> None:
    ours, theirs = (LIKELIHOOD, LIKELIHOOD), (PREFERENCE, PREFERENCE)
    both = {ours: 9.0, theirs: 16.0, (LIKELIHOOD, PREFERENCE): -6.0}
    tensors = {key: torch.tensor(value) for key, value in both.items()}
    assert figures(tensors) == {
        "meter/likelihood_norm": 3,
        "meter/preference_norm": 4,
        "meter/preference_share": pytest.approx(4 / 7),
        "meter/cosine": -0.5,
    }
    assert figures({ours: tensors[ours]}) == {
        "meter/likelihood_norm": 3,
        "meter/preference_share": 0,
    }
    assert figures({theirs: tensors[theirs]}) == {
        "meter/preference_norm": 4,
        "meter/preference_share": 1,
    }
    zero = torch.zeros(())
    at_beta_0 = figures(tensors | {theirs: zero, (LIKELIHOOD, PREFERENCE): zero})
    assert at_beta_0 == {
        "meter/likelihood_norm": 3,
        "meter/preference_norm": 0,
        "meter/preference_share": 0,
    }
    assert figures({ours: zero}) == {"meter/likelihood_norm": 0}


def test_a_method_of_one_term_is_measured_as_such(
    load: Load, build_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    lengths = ("train.max_steps=2", "train.meter_steps=2")
    loaded = load("method=sft", "optimizer=lora", *SMALL, *lengths)
    _, place = fit(loaded, build_model(loaded), tokenizer, tmp_path)
    (line,) = (line for line in place.metrics() if "meter/likelihood_norm" in line)
    assert line.keys() == {"step", "epoch", "meter/likelihood_norm", "meter/preference_share"}
    assert line["meter/preference_share"] == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("train.meter_steps=0", "train.meter_steps=0 must be at least 1"),
        ("engine=trl train.meter_steps=5", "train.meter_steps=5 needs engine=shared_prefix"),
    ],
)
def test_what_cannot_be_measured_is_refused(load: Load, overrides: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(*overrides.split())
