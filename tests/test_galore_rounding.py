"""What `benchmarks/galore_rounding.py` measures with: narrower products beside rounding's noise."""

import pytest
import torch

from benchmarks.galore_rounding import NARROW, compare, narrow, rounding_variance, shares
from orpo_lab.optimizer.write_back import stochastic_round


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_numbers_are_rounded_to_nearest_at_every_width() -> None:
    wide = torch.randn(10_000)
    assert torch.equal(narrow(wide, NARROW["bf16"]), wide.bfloat16().float())
    tf32 = narrow(wide, NARROW["tf32"])
    assert ((tf32 - wide).abs() <= 2.0**-11 * wide.abs()).all()
    assert ((tf32 - wide).abs() > 2.0**-13 * wide.abs()).any()
    assert (tf32.view(torch.int32) % 2 ** NARROW["tf32"] == 0).all()


def test_the_noise_of_rounding_is_what_rounding_does() -> None:
    wide = torch.randn(20)
    generator = torch.Generator().manual_seed(0)
    errors = stochastic_round(wide.repeat(10_000, 1), generator) - wide
    assert torch.allclose(
        errors.double().square().mean(0), rounding_variance(wide), rtol=0.1, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(192, 128), (128, 192)])
def test_tf32_is_far_below_the_noise_of_rounding(shape: tuple[int, int]) -> None:
    """Weights, and Adam's updates, of a size as in a 7B model, at the recipe's learning rate."""
    weight = 0.02 * torch.randn(shape)
    tall = shape[0] > shape[1]
    update = 5e-5 * torch.randn(max(shape), 32)
    basis = torch.linalg.qr(torch.randn(min(shape), 32)).Q
    factors = (update, basis.mT) if tall else (basis, update.mT)
    found = compare(weight, factors, 1.0, 0.25)
    exact = 0.25 * (factors[0].double() @ factors[1].double())
    assert torch.allclose(found["update"].double(), exact, rtol=0, atol=0.01 * float(exact.std()))
    part = shares(found)
    assert part["tf32_over_noise"] < 1e-4
    assert part["tf32_over_update"] < 2.0**-11 < part["bf16_over_update"] < 2.0**-8
