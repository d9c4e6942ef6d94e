import math

import pytest
import torch
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp

from orpo_lab.loss import log1mexp, log_odds_ratio


def test_log1mexp_equals_float64_and_trl() -> None:
    x = -torch.logspace(-6, 1.5, 200, dtype=torch.float64)
    exact = torch.tensor([math.log(-math.expm1(value)) for value in x.tolist()])
    assert torch.allclose(log1mexp(x.float()).double(), exact.double(), rtol=2e-6)
    assert torch.equal(log1mexp(x.float()), trl_log1mexp(x.float()))


def test_log1mexp_and_its_gradient_stay_finite_as_p_nears_one() -> None:
    x = torch.tensor([-1e-7, -1e-3, -0.7, -50.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_log_odds_ratio_is_that_of_the_paper() -> None:
    chosen, rejected = torch.tensor([0.8, 0.3]).log(), torch.tensor([0.5, 0.6]).log()
    odds = [(0.8 / 0.2) / (0.5 / 0.5), (0.3 / 0.7) / (0.6 / 0.4)]
    expected = [math.log(one) for one in odds]
    assert log_odds_ratio(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-5)
