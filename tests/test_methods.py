"""The methods: ORPO against its equations, and a method that no other room knows."""

import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp

from orpo_lab import engine, methods
from orpo_lab.config.method import OrpoMethod
from orpo_lab.methods.base import Batch, Losses, mean_logps, preference_terms
from orpo_lab.methods.odds import log1mexp, log_odds_ratio
from orpo_lab.methods.orpo import Orpo
from orpo_lab.training.devices import OneDevice

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def orpo(scope: str, mean: str, penalty: str, scale: float = 1.0) -> OrpoMethod:
    return OrpoMethod(
        default_beta=0.1,
        learning_rate_factor=1.0,
        nll_scope=scope,
        nll_mean=mean,
        penalty=penalty,
        log_odds_scale=scale,
    )


def batch(logps: Tensor, counts: Tensor, num_supervised: Any, num_pairs: Any) -> Batch:
    return Batch(
        logps,
        counts,
        reference=None,
        num_supervised=torch.as_tensor(num_supervised),
        num_pairs=torch.as_tensor(num_pairs),
    )


READINGS = [
    orpo("prompt_and_completion", "tokens", "log_sigmoid"),
    orpo("completion", "sequences", "log_odds"),
]


def exact(x: float) -> tuple[float, float]:
    """Return log(1 - exp(x)) and its derivative, from fifty digits."""
    with mpmath.workdps(50):
        rest = -mpmath.expm1(mpmath.mpf(x))
        return float(mpmath.log(rest)), float(-mpmath.exp(mpmath.mpf(x)) / rest)


def with_slope(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


@pytest.mark.parametrize("dtype", DTYPES)
def test_log1mexp_and_its_slope_are_exact_wherever_p_is_below_1(dtype: torch.dtype) -> None:
    smallest = math.log10(torch.finfo(dtype).tiny)
    exponents = torch.linspace(smallest, 1.9, 2000, dtype=torch.float64)
    around_the_split = -math.log(2) * (1 + torch.linspace(-1e-2, 1e-2, 101, dtype=torch.float64))
    x = torch.cat([-(10**exponents), around_the_split]).to(dtype)
    x = x[x <= -torch.finfo(dtype).tiny]
    values, slopes = with_slope(log1mexp, x)
    expected = torch.tensor([exact(number) for number in x.tolist()], dtype=torch.float64)
    rtol = 8 * torch.finfo(dtype).eps
    assert torch.allclose(values.double(), expected[:, 0], rtol=rtol, atol=0)
    assert torch.allclose(slopes.double(), expected[:, 1], rtol=rtol, atol=0)


def test_log1mexp_is_trls_where_trls_is_right() -> None:
    x = -torch.logspace(-6, 1.5, 200)
    assert torch.equal(log1mexp(x), trl_log1mexp(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_of_1_counts_as_the_nearest_p_below_and_pulls_at_nothing(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, -0.0, -tiny / 2, -5e-324, -tiny], dtype=dtype)
    values, slopes = with_slope(log1mexp, x)
    assert values.tolist() == pytest.approx([math.log(tiny)] * 5, rel=8 * torch.finfo(dtype).eps)
    assert slopes[:4].tolist() == [0] * 4
    assert slopes[4].item() == pytest.approx(-1 / tiny, rel=8 * torch.finfo(dtype).eps)


@given(st.floats(max_value=0, allow_infinity=False, width=32), st.sampled_from(DTYPES))
def test_log1mexp_and_its_slope_are_finite_for_every_log_p(x: float, dtype: torch.dtype) -> None:
    values, slopes = with_slope(log1mexp, torch.tensor([x], dtype=dtype))
    assert torch.isfinite(values).all()
    assert torch.isfinite(slopes).all()


@pytest.mark.parametrize("method", READINGS)
@given(
    st.floats(max_value=0, min_value=-1e4, width=32),
    st.floats(max_value=0, min_value=-1e4, width=32),
)
def test_the_loss_and_its_gradient_are_finite_for_every_pair_of_log_ps(
    method: OrpoMethod, chosen: float, rejected: float
) -> None:
    logps = torch.tensor([[-3.0, chosen, rejected], [-2.0, -1.0, -1.5]], requires_grad=True)
    losses = Orpo(method).losses(batch(logps, torch.ones(2, 3), 4.0, 2.0), beta=0.1)
    losses.loss.backward()
    assert logps.grad is not None
    assert torch.isfinite(logps.grad).all()
    assert torch.isfinite(losses.loss)
    assert all(torch.isfinite(term).all() for term in losses.terms.values())


def test_log_odds_ratio_is_that_of_the_paper() -> None:
    chosen, rejected = torch.tensor([0.8, 0.3]).log(), torch.tensor([0.5, 0.6]).log()
    odds = [(0.8 / 0.2) / (0.5 / 0.5), (0.3 / 0.7) / (0.6 / 0.4)]
    expected = [math.log(ratio) for ratio in odds]
    assert log_odds_ratio(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-5)
    # Of numbers in half precision it is computed as if they were in fp32
    narrow = chosen.bfloat16(), rejected.bfloat16()
    wide = log_odds_ratio(*(logps.float() for logps in narrow))
    assert torch.equal(log_odds_ratio(*narrow), wide)


def by_equations(
    pairs: list[Any], beta: float, scope: str, mean: str, penalty: str, scale: float
) -> float:
    """The loss of a step in plain floats, from each pair's (sum, count) of its three parts."""
    learned = [[part for part in pair[:2] if part[1]] for pair in pairs]
    if scope == "completion":
        learned = [parts[-1:] for parts in learned]
    sums = [sum(logp for logp, _ in parts) for parts in learned]
    counts = [sum(num for _, num in parts) for parts in learned]
    nll = -sum(sums) / sum(counts)
    if mean == "sequences":
        nll = -sum(total / num for total, num in zip(sums, counts, strict=True)) / len(pairs)

    def log_odds(part: tuple[float, int]) -> float:
        p = math.exp(part[0] / part[1])
        return math.log(p / (1 - p))

    ratios = [log_odds(chosen) - log_odds(rejected) for _, chosen, rejected in pairs]
    if penalty == "log_sigmoid":
        ratios = [-math.log1p(math.exp(-scale * ratio)) for ratio in ratios]
    return nll - beta * sum(ratios) / len(ratios)


@pytest.mark.parametrize(
    ("penalty", "scale"), [("log_sigmoid", 1.0), ("log_sigmoid", 2.5), ("log_odds", 1.0)]
)
@pytest.mark.parametrize("mean", ["tokens", "sequences"])
@pytest.mark.parametrize("scope", ["prompt_and_completion", "completion"])
def test_the_shares_of_a_steps_parts_add_up_to_its_equations(
    scope: str, mean: str, penalty: str, scale: float
) -> None:
    """The scale is beta of arXiv:2502.01237, inside the log-sigmoid."""
    method = orpo(scope, mean, penalty, scale)
    counts = torch.tensor([[3, 5, 2], [0, 1, 4], [6, 2, 9], [2, 7, 3], [1, 3, 1]])
    draw = torch.Generator().manual_seed(0)
    logps = -counts * (0.2 + torch.rand(5, 3, generator=draw, dtype=torch.float64))
    if scope == "completion":  # what the prompt comes to is not asked for then
        counts[:, 0], logps[:, 0] = 0, 0
    num_tokens = counts[:, :2].sum()
    losses = [
        Orpo(method).losses(batch(logps[part], counts[part], num_tokens, 5), beta=0.3).loss
        for part in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    pairs = [
        list(zip(*row, strict=True)) for row in zip(logps.tolist(), counts.tolist(), strict=True)
    ]
    expected = by_equations(pairs, 0.3, scope, mean, penalty, scale)
    assert float(sum(losses)) == pytest.approx(expected, rel=1e-12)


def test_a_pair_that_is_as_likely_either_way_is_not_preferred() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    assert preference_terms(chosen, rejected)["preference_accuracy"].tolist() == [0, 1, 0]
    logps = torch.stack([torch.zeros(3), chosen, rejected], dim=1)
    terms = Orpo(READINGS[0]).losses(batch(logps, torch.ones(3, 3), 3.0, 3.0), beta=0.1).terms
    assert terms["rewards/accuracies"].tolist() == [0, 1, 0]


class Hinge:
    """A method of one term: SLiC's hinge loss (Zhao et al. 2023, arXiv:2305.10425)."""

    scores_prompt = False
    reads_rejected = True
    needs_reference = False
    needs_divergence = False

    def num_supervised(self, counts: Tensor) -> Tensor:
        return torch.zeros(len(counts))

    def losses(self, batch: Batch, beta: float) -> Losses:
        chosen, rejected = mean_logps(batch)
        hinge = torch.relu(1 - beta * (chosen - rejected))
        terms = {"hinge_loss": hinge} | preference_terms(chosen, rejected)
        return Losses(None, hinge.sum() / batch.num_pairs, terms)


def test_an_engine_trains_by_a_method_that_it_does_not_know(
    load: Any, build_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, every gradient and the terms, against the equation on plain sequences."""
    loaded = load("optimizer=adamw")
    monkeypatch.setattr(methods, "build", lambda config: Hinge())
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [
        {"prompt_ids": row[:4], "chosen_ids": row[4:7], "rejected_ids": row[7:]} for row in ids
    ]
    model = build_model(loaded)
    margins = []
    for pair in pairs:
        means = []
        for side in ("chosen_ids", "rejected_ids"):
            sequence = torch.tensor([pair["prompt_ids"] + pair[side]])
            logps = model(input_ids=sequence).logits[0, :-1].log_softmax(-1)
            means.append(logps.gather(1, sequence[0, 1:, None])[3:].mean())
        margins.append(means[0] - means[1])
    expected = torch.relu(1 - 2.0 * torch.stack(margins)).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    devices = OneDevice(torch.device("cpu"), torch.float32)
    built = engine.build(loaded, model=model, tokenizer=tokenizer, devices=devices)
    micro_batches = built.micro_batches(pairs)
    assert len(micro_batches) == 1
    with built.reading():
        score = built.score(micro_batches[0], beta=2.0)
    score.loss.backward()
    assert score.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert score.sums.names[0] == "hinge_loss"
    assert score.sums.values[0].item() == pytest.approx(3 * expected.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-5 * largest, name
