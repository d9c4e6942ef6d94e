"""Adding an update to a weight by torch's operators; `test_kernel.py` has the kernel."""

import logging
import math
import sys

import pytest
import torch
from torch import Tensor

from orpo_lab.optimizer import write_back
from orpo_lab.optimizer.write_back import stochastic_round

KEY = 2**62 + 12345


def example(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A weight, and an update of it in fp32 or wider, large beside its last place."""
    generator = torch.Generator().manual_seed(0)
    weight, update = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (update.to(torch.promote_types(dtype, torch.float32)),)


def factors(side: str, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of an update [70, 150]; the basis has the weight's dtype, as in GaLore."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    left = torch.randn(70, rank, generator=generator).to(wide if side == "right" else dtype)
    right = torch.randn(150, rank, generator=generator).to(dtype if side == "right" else wide)
    return left, right.mT


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weight_decays_and_takes_its_update(dtype: torch.dtype, side: str | None) -> None:
    weight, parts = example((70, 150), dtype)
    parts = factors(side, 10, dtype) if side else parts
    exact = [part.double() for part in parts]
    update = exact[0] @ exact[1] if side else exact[0]
    expected = 0.75 * weight.double() + 0.5 * update
    update = exact[0].abs() @ exact[1].abs() if side else exact[0].abs()
    size = 0.75 * weight.double().abs() + 0.5 * update
    write_back.write_back(weight, parts, keep=0.75, scale=0.5, key=KEY)
    # The last place of the result, and of every sum and product on the way
    limit = torch.finfo(dtype).eps * expected.abs() + 12 * torch.finfo(parts[0].dtype).eps * size
    assert ((weight.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("shape", [(), (7,), (70, 150), (3, 5, 11)])
def test_parts_get_the_numbers_that_the_whole_would_get(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, parts = example(shape, torch.bfloat16)
    wide = weight.float().mul_(0.9).add_(parts[0])
    expected = stochastic_round(wide, torch.Generator().manual_seed(KEY)).bfloat16()
    monkeypatch.setattr(write_back, "PART", 64)
    write_back.write_back(weight, parts, keep=0.9, scale=1.0, key=KEY)
    assert torch.equal(weight, expected)


def test_a_weight_of_any_layout_is_written_in_place() -> None:
    transposed = torch.zeros(150, 70, dtype=torch.bfloat16)
    update = torch.arange(70 * 150.0).view(70, 150) % 256  # bf16 can hold it
    write_back.write_back(transposed.mT, (update,), keep=1.0, scale=1.0, key=KEY)
    assert torch.equal(transposed.mT.float(), update)


def test_stochastic_rounding_keeps_what_bf16_can_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, 3e38]).bfloat16().float()
    rounded = stochastic_round(exact.clone(), generator)
    assert torch.equal(rounded, exact)
    third = torch.full((100_000,), 1 + 2**-7 / 3)
    rounded = stochastic_round(third.clone(), generator)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).double().mean()
    assert abs(float(share) - 1 / 3) < 0.01


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=["cpu", "gpu", "negative"])
def test_nan_stays_nan_whatever_its_bits(bits: int) -> None:
    nan = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nan, torch.Generator().manual_seed(0)).isnan().all()


def test_a_kernel_that_cannot_be_used_is_named_once_and_torch_does_its_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write_back, "_kernel_failed", False)
    expected, parts = example((70, 150), torch.bfloat16)
    weight = expected.clone()
    write_back.write_back(expected, parts, keep=0.9, scale=1.0, key=KEY)
    # A mock: on a CPU every weight is refused before Triton is looked for
    monkeypatch.setattr(write_back, "_fits_kernel", lambda _: True)
    # None stands for a module that cannot be imported, as where Triton is missing
    monkeypatch.setitem(sys.modules, "orpo_lab.optimizer.kernel", None)
    monkeypatch.delattr("orpo_lab.optimizer.kernel", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = weight.clone()
            write_back.write_back(got, parts, keep=0.9, scale=1.0, key=KEY)
            assert torch.equal(got, expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the kernel that writes bf16 weights cannot be used" in caplog.text
