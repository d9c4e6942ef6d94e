import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orpo_lab.beta_schedule import adapted, betas
from orpo_lab.config.beta_schedule import (
    Adaptive,
    BetaSchedule,
    Constant,
    Cosine,
    HoldThenAnneal,
    Linear,
    Step,
)

ANNEALING = [Linear(), Cosine(), Step(milestones=[0.5, 0.75]), HoldThenAnneal(anneal_fraction=0.4)]


def curve(schedule: BetaSchedule, num_steps: int, beta: float, beta_end: float) -> list[float]:
    return betas(schedule, num_steps, beta=beta, beta_end=beta_end)


@pytest.mark.parametrize("schedule", ANNEALING)
@pytest.mark.parametrize("ends", [(0.3, 0.05), (0.05, 0.3)])
def test_annealing_runs_from_beta_to_beta_end_and_never_turns_back(
    schedule: BetaSchedule, ends: tuple[float, float]
) -> None:
    betas = curve(schedule, 101, *ends)
    assert betas[0] == ends[0]
    assert betas[-1] == pytest.approx(ends[1], abs=1e-12)
    ordered = sorted(betas, reverse=ends[0] > ends[1])
    assert betas == ordered


def test_constant_does_not_read_beta_end() -> None:
    assert set(curve(Constant(), 50, 0.1, 9.0)) == {0.1}


def test_linear_and_cosine_follow_their_formulas() -> None:
    assert curve(Linear(), 5, 0.4, 0.0) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    half = (1 - math.cos(math.pi / 4)) / 2
    expected = [0.4, 0.4 * (1 - half), 0.2, 0.4 * half, 0.0]
    assert curve(Cosine(), 5, 0.4, 0.0) == pytest.approx(expected)


def test_step_jumps_at_its_milestones() -> None:
    betas = curve(Step(milestones=[0.5, 0.75]), 101, 0.3, 0.1)
    assert betas[49] == 0.3
    assert betas[50] == pytest.approx(0.2)
    assert betas[74] == pytest.approx(0.2)
    assert betas[75] == pytest.approx(0.1)


def test_hold_then_anneal_holds_and_falls_in_the_final_part() -> None:
    betas = curve(HoldThenAnneal(anneal_fraction=0.4), 101, 0.3, 0.05)
    assert set(betas[:61]) == {0.3}
    assert betas[80] == pytest.approx(0.175)


def test_a_run_of_one_step_uses_beta() -> None:
    assert curve(Linear(), 1, 0.2, 0.0) == [0.2]


# An adaptive beta


def adaptive(alpha: float = 0.6, momentum: float = 0.9, max_change: float = 0.9) -> Adaptive:
    return Adaptive(alpha=alpha, momentum=momentum, max_change=max_change)


@pytest.mark.parametrize("direction", [1, -1])
def test_an_adaptive_beta_follows_the_equations_of_beta_dpo(direction: int) -> None:
    average, betas = None, []
    for margin in (1.0, 1.5, 0.5, 1.2):
        beta, average = adapted(adaptive(), margin, average, beta=0.1, direction=direction)
        betas.append(beta)
    averages = [1.0, 1.05, 0.9 * 1.05 + 0.1 * 0.5]
    gaps = [0, 0.5, 0.5 - averages[1], 1.2 - averages[2]]
    assert betas == pytest.approx([0.1 * (1 + direction * 0.6 * gap) for gap in gaps])
    assert average == pytest.approx(0.9 * averages[2] + 0.1 * 1.2)


@settings(deadline=None, derandomize=True, database=None)
@example(margin=math.nan, average=0.3, alpha=0.6, max_change=0.9, direction=1)
@example(margin=1e30, average=-1e300, alpha=1e10, max_change=0.9, direction=-1)
@given(
    margin=st.floats(),
    average=st.none() | st.floats(-1e300, 1e300),
    alpha=st.floats(1e-3, 1e300),
    max_change=st.floats(0.01, 0.999),
    direction=st.sampled_from([1, -1]),
)
def test_an_adaptive_beta_stays_positive_and_near_beta(
    margin: float, average: float | None, alpha: float, max_change: float, direction: int
) -> None:
    schedule = adaptive(alpha=alpha, max_change=max_change)
    beta, moved = adapted(schedule, margin, average, beta=0.1, direction=direction)
    assert beta > 0
    assert abs(beta - 0.1) <= 0.1 * max_change * (1 + 1e-9)
    if math.isfinite(margin):
        assert moved is not None
        assert math.isfinite(moved)
    else:
        assert (beta, moved) == (0.1, average)
