import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp

from orpo_lab.config import Objective
from orpo_lab.loss import log1mexp, log_odds_ratio, orpo

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OBJECTIVES = [
    Objective(nll_scope="prompt_and_completion", nll_mean="tokens", penalty="log_sigmoid"),
    Objective(nll_scope="completion", nll_mean="sequences", penalty="log_odds"),
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
    expected = torch.tensor([exact(one) for one in x.tolist()], dtype=torch.float64)
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


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(
    st.floats(max_value=0, min_value=-1e4, width=32),
    st.floats(max_value=0, min_value=-1e4, width=32),
)
def test_the_loss_and_its_gradient_are_finite_for_every_pair_of_log_ps(
    objective: Objective, chosen: float, rejected: float
) -> None:
    logps = torch.tensor([[-3.0, chosen, rejected], [-2.0, -1.0, -1.5]], requires_grad=True)
    num = torch.tensor(2.0)
    counts = torch.ones(2, 3)
    losses = orpo(logps, counts, beta=0.1, objective=objective, num_tokens=2 * num, num_pairs=num)
    losses.loss.backward()
    assert logps.grad is not None
    assert torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(one).all() for one in vars(losses).values())


def test_log_odds_ratio_is_that_of_the_paper() -> None:
    chosen, rejected = torch.tensor([0.8, 0.3]).log(), torch.tensor([0.5, 0.6]).log()
    odds = [(0.8 / 0.2) / (0.5 / 0.5), (0.3 / 0.7) / (0.6 / 0.4)]
    expected = [math.log(one) for one in odds]
    assert log_odds_ratio(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-5)
    # Of numbers in half precision it is computed as if they were in fp32
    narrow = chosen.bfloat16(), rejected.bfloat16()
    wide = log_odds_ratio(*(one.float() for one in narrow))
    assert torch.equal(log_odds_ratio(*narrow), wide)


def by_equations(pairs: list[Any], beta: float, scope: str, mean: str, penalty: str) -> float:
    """The loss of a step in plain floats, from each pair's (sum, count) of its three parts."""
    learned = [[part for part in pair[:2] if part[1]] for pair in pairs]
    if scope == "completion":
        learned = [parts[-1:] for parts in learned]
    sums = [sum(one for one, _ in parts) for parts in learned]
    counts = [sum(num for _, num in parts) for parts in learned]
    nll = -sum(sums) / sum(counts)
    if mean == "sequences":
        nll = -sum(one / num for one, num in zip(sums, counts, strict=True)) / len(pairs)

    def log_odds(part: tuple[float, int]) -> float:
        p = math.exp(part[0] / part[1])
        return math.log(p / (1 - p))

    ratios = [log_odds(chosen) - log_odds(rejected) for _, chosen, rejected in pairs]
    if penalty == "log_sigmoid":
        ratios = [-math.log1p(math.exp(-one)) for one in ratios]
    return nll - beta * sum(ratios) / len(ratios)


@pytest.mark.parametrize("penalty", ["log_sigmoid", "log_odds"])
@pytest.mark.parametrize("mean", ["tokens", "sequences"])
@pytest.mark.parametrize("scope", ["prompt_and_completion", "completion"])
def test_the_shares_of_a_steps_parts_add_up_to_its_equations(
    scope: str, mean: str, penalty: str
) -> None:
    objective = Objective(nll_scope=scope, nll_mean=mean, penalty=penalty)
    counts = torch.tensor([[3, 5, 2], [0, 1, 4], [6, 2, 9], [2, 7, 3], [1, 3, 1]])
    draw = torch.Generator().manual_seed(0)
    logps = -counts * (0.2 + torch.rand(5, 3, generator=draw, dtype=torch.float64))
    if scope == "completion":  # what the prompt comes to is not asked for then
        counts[:, 0], logps[:, 0] = 0, 0
    num_tokens = counts[:, :2].sum()
    losses = [
        orpo(
            logps[part],
            counts[part],
            beta=0.3,
            objective=objective,
            num_tokens=num_tokens,
            num_pairs=torch.tensor(5),
        ).loss
        for part in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    pairs = [
        list(zip(*one, strict=True)) for one in zip(logps.tolist(), counts.tolist(), strict=True)
    ]
    expected = by_equations(pairs, 0.3, scope, mean, penalty)
    assert float(sum(losses)) == pytest.approx(expected, rel=1e-12)
