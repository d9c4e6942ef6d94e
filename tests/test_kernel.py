"""The Triton kernel that writes bf16 weights, against Philox and rounding in numpy.

Triton is part of torch's builds for GPUs. Without a GPU the kernel's arithmetic runs on the CPU in
Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/test_kernel.py`. Without Triton, or without
both, these tests are skipped. The interpreter does not round to TF32, and compiles nothing.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.test_write_back import KEY, example, factors

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)

LOW = np.uint64(2**32 - 1)
HALF = np.uint64(32)


def philox(key: int, counters: np.ndarray) -> list[np.ndarray]:
    """Philox 4x32-10 by its paper (Salmon et al. 2011); the other three counters are 0."""
    keys = [np.uint64(key % 2**32), np.uint64(key >> 32)]
    c = [counters.astype(np.uint64), *np.zeros((3, len(counters)), np.uint64)]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> HALF) ^ c[1] ^ keys[0],
            second & LOW,
            (first >> HALF) ^ c[3] ^ keys[1],
            first & LOW,
        ]
        steps = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
        keys = [(k + step) & LOW for k, step in zip(keys, steps, strict=True)]
    return c


def noise(key: int, num_rows: int, num_columns: int) -> Tensor:
    """The random numbers of a weight: eight in a row share a counter."""
    eights = -(-num_columns // 8)
    words = np.stack(philox(key, np.arange(num_rows * eights)), axis=1)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    numbers = halves.reshape(num_rows, eights * 8)[:, :num_columns]
    return torch.from_numpy(numbers.astype(np.int32))


def rounded(wide: Tensor, key: int) -> Tensor:
    """Fp32 numbers rounded by the random numbers of the key."""
    rows = wide.view(-1, wide.shape[-1] if wide.ndim else 1)
    bits = rows.view(torch.int32) + noise(key, *rows.shape)
    return (bits & -65536).view(torch.float32).bfloat16().view_as(wide)


def by_kernel(weight: Tensor, parts: tuple[Tensor, ...], keep: float, scale: float) -> Tensor:
    from orpo_lab.optimizer import kernel

    on_device = weight.to(DEVICE, copy=True)
    kernel.add_rounded(on_device, tuple(part.to(DEVICE) for part in parts), keep, scale, KEY)
    return on_device.cpu()


def test_the_reference_is_philox() -> None:
    # The known answer of its authors' library (Random123, kat_vectors)
    words = [int(word[0]) for word in philox(0, np.zeros(1))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_device
@pytest.mark.parametrize("shape", [(), (300,), (70, 150), (3, 5, 11)])
def test_an_update_is_rounded_by_philox(shape: tuple[int, ...]) -> None:
    weight, parts = example(shape, torch.bfloat16)
    wide = weight.float() * 0.75 + parts[0] * 0.5
    assert torch.equal(by_kernel(weight, parts, 0.75, 0.5), rounded(wide, KEY))


@needs_device
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [10, 70])
def test_a_product_is_added_and_rounded(side: str, rank: int) -> None:
    weight, _ = example((70, 150), torch.bfloat16)
    left, right = factors(side, rank, torch.bfloat16)
    # So that TF32 holds both factors, and only the order of the sums can differ
    left, right = left.bfloat16().to(left.dtype), right.bfloat16().to(right.dtype)
    wide = weight.float() * 0.75 + left.float() @ right.float() * 0.5
    found, expected = by_kernel(weight, (left, right), 0.75, 0.5), rounded(wide, KEY)
    assert (found == expected).double().mean() > 0.998
    assert ((found.float() - expected.float()).abs() <= 2**-7 * wide.abs() + 1e-5).all()


@needs_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_what_bf16_can_hold_stays_and_nan_stays_nan() -> None:
    exact = torch.tensor([0.0, 1.5, -2.0, torch.inf, -torch.inf, 3e38]).bfloat16()
    assert torch.equal(by_kernel(exact, (torch.zeros(6),), 1.0, 1.0), exact)
    weight = torch.tensor([torch.nan, torch.inf, 1.0]).bfloat16()
    update = torch.tensor([0.0, -torch.inf, torch.nan])
    assert by_kernel(weight, (update,), 1.0, 1.0).isnan().all()


@needs_device
def test_the_mean_is_kept() -> None:
    weight = torch.ones(200, 500, dtype=torch.bfloat16)
    found = by_kernel(weight, (torch.full((200, 500), 2**-7 / 3),), 1.0, 1.0)
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(float((found > 1).double().mean()) - 1 / 3) < 0.006  # four standard errors


@needs_device
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_galore_takes_it_and_goes_on_bit_for_bit(
    proj_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orpo_lab.optimizer import write_back
    from orpo_lab.optimizer.galore import GaLore

    if INTERPRETED:
        monkeypatch.setattr(write_back, "_fits_kernel", lambda _: True)
    monkeypatch.setattr(write_back, "_add_rounded", None)  # would fail instead of falling back

    def run(start: Tensor, state: Any, steps: range) -> tuple[Tensor, Any]:
        weight = nn.Parameter(start.clone())
        optimizer = GaLore([weight], lr=1e-3, rank=8, proj_type=proj_type, update_proj_gap=2)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()
        return weight.detach(), optimizer.state_dict()

    start = example((70, 40), torch.bfloat16)[0].to(DEVICE)
    whole, _ = run(start, None, range(5))
    again, _ = run(*run(start, None, range(3)), range(3, 5))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, start)


# Compute capability, and the shared memory of a block there in KB (CUDA's programming guide)
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "shared_kb"), [(80, 163), (86, 99), (89, 99), (90, 227)])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_it_compiles_and_fits_every_generation(
    capability: int, shared_kb: int, side: str | None
) -> None:
    """Compilation needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from orpo_lab.optimizer import kernel

    function = kernel._add_rounded
    types = {"weight": "*bf16", "left": "*fp32", "right": "*bf16", "key": "i64"}
    if side == "left":
        types |= {"left": "*bf16", "right": "*fp32"}
    types |= dict.fromkeys(("num_rows", "num_columns", "left_row"), "i32")
    types |= {"keep": "fp32", "scale": "fp32", "right_row": "i32", "right_column": "i32"}
    constants = {**kernel.TILE, "rank": 128 if side else 0, "left_column": 1}
    constants["right_row" if side == "right" else "right_column"] = 1
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=kernel.LAUNCH
    )
    assert "tf32" in compiled.asm["ptx"] or side is None
    assert compiled.metadata.shared <= shared_kb * 1024
